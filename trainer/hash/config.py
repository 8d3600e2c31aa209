"""Configuration of `recpress hash`. Free of torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from recpress.data.config import Schema
from recpress.data.errors import InputError
from recpress.modules.config import HashConfig
from recpress.trainer.config import at_least


@dataclass(frozen=True, kw_only=True)
class HashStageConfig(HashConfig):
    """Map the ids of tables to fewer rows, from their counts and an embedding, under a budget."""

    data: str
    """The log: a folder, file or glob."""
    out: str
    """Folder of the maps; must not exist unless --overwrite."""
    factors: str | None = None
    """Folder of factors of this log: the embedding of users and items."""
    embedding: tuple[str, ...] = ()
    """Embeddings from elsewhere, as TABLE=FILE: a .npy, a .parquet, or FILE.pt:KEY; they come before the factors."""
    features: tuple[str, ...] = ()
    """Categorical columns of the log to map, instead of users and items. Those without an embedding get one from a
    quick warm-up: a factorization machine of the label."""
    warm_rows: int = 1_000_000
    """About so many rows, a uniform sample, train the warm-up. It sees labels, and so does a map of it: take a part of
    the log, not all of it, where a network is to train on the same rows (docs/reference/synthetic-criteo.md)."""
    warm_dim: int = 8
    """Dimension of its vectors."""
    share: float = 0.25
    """Budget of rows, all tables together, as a share of their ids."""
    rows: int = 0
    """The budget as a number of rows; 0: --share."""
    bytes: int = 0
    """The budget in bytes of float32 rows of the embedding's dimension; 0: --rows or --share."""
    table_rows: tuple[str, ...] = ()
    """Rows of single tables, as TABLE=ROWS; the others share what is left of the budget."""
    split: Literal["distortion", "ids"] = "distortion"
    """How tables share the budget: where a row lowers the distortion most (`cluster`, `learned`), or in proportion to
    their ids (the other methods always)."""
    row_vectors: bool = True
    """Write the vector of each row too, the best fit of its ids' embedding; `recpress train` starts from them."""
    extend: str | None = None
    """Maps of an earlier part of this log: its ids keep their rows, new ones get the nearest or a hashed one."""
    on_bad_file: Literal["stop", "skip"] = "stop"
    """A file or row group that cannot be read, after the retries: `stop` ends the stage with its name; `skip` leaves
    its rows out of the counts and the warm-up, names and counts it (docs/train/log.md)."""
    schema: Schema = field(default_factory=Schema)
    overwrite: bool = False
    """Replace an existing --out."""

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise InputError(f"share is {self.share}, expected a number in (0, 1]")
        at_least(0, rows=self.rows, bytes=self.bytes)
        at_least(1, warm_rows=self.warm_rows, warm_dim=self.warm_dim, iterations=self.iterations)
