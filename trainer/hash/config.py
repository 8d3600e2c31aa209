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
    """Map the ids of tables to fewer embedding rows within a budget, from their counts and an embedding."""

    data: str
    """The log: a folder, file or glob."""
    out: str
    """Folder of the maps; must not exist unless --overwrite."""
    factors: str | None = None
    """Folder of factors of this log, the embeddings of users and items."""
    embedding: tuple[str, ...] = ()
    """Embeddings from files, as TABLE=FILE: .npy, .parquet, FILE.pt:KEY, or FOLDER:KEY of torch.distributed.checkpoint.
    They replace the factors of a table."""
    features: tuple[str, ...] = ()
    """Categorical columns of the log to map, instead of users and items. For those without an embedding a short warm-up
    trains one: a factorization machine of the label."""
    warm_rows: int = 1_000_000
    """Approximate number of rows of the warm-up, a uniform sample. It uses labels, as does its map: use a part
    of the log if a network trains on the same rows (docs/reference/synthetic-criteo.md)."""
    warm_dim: int = 8
    """Dimension of the vectors of the warm-up."""
    share: float = 0.25
    """Budget of embedding rows of all tables together, as a share of their ids."""
    rows: int = 0
    """The budget as a number of rows; 0: --share."""
    bytes: int = 0
    """The budget in bytes of float32 rows of the embedding's dimension; 0: --rows or --share."""
    table_rows: tuple[str, ...] = ()
    """Rows of single tables, as TABLE=ROWS; the others share the rest of the budget."""
    split: Literal["distortion", "ids"] = "distortion"
    """How tables share the budget: to minimize the distortion (`cluster` and `learned` only), or in proportion to their
    ids."""
    row_vectors: bool = True
    """Also write the vector of each row, the best fit to the embedding of its ids; `recpress train` starts from it."""
    extend: str | None = None
    """Maps of an earlier part of this log. Its ids keep their rows; new ids get the nearest row or a hashed one."""
    on_bad_file: Literal["stop", "skip"] = "stop"
    """For a file or row group that cannot be read, after retries: `stop` ends the stage and names it; `skip` skips its
    rows, and names and counts it (docs/train/log.md)."""
    schema: Schema = field(default_factory=Schema)
    overwrite: bool = False
    """Replace an existing --out."""

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise InputError(f"share is {self.share}, expected a number in (0, 1]")
        at_least(0, rows=self.rows, bytes=self.bytes)
        at_least(1, warm_rows=self.warm_rows, warm_dim=self.warm_dim, iterations=self.iterations)
