"""What a hashing method is given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from recpress.modules.config import HashConfig
from recpress.modules.hashing.id_map import IdMap
from recpress.modules.rows import RowSource

Progress = Callable[[str, int, int], None]
"""(stage, ids done, ids in all)."""


@dataclass(frozen=True, eq=False, kw_only=True)
class IdTable:
    """What is known of the ids of one table.

    Raises:
        ValueError: counts or embedding of another length than the number of ids.
    """

    name: str
    num_ids: int
    counts: torch.Tensor | None = None
    """How often each id is accessed, (num_ids,), finite and >= 0."""
    embedding: RowSource | None = None
    """(num_ids, d) float32, read in blocks: factors, a table of the model, a warm-up."""
    vocabulary: str | None = None
    """Fingerprint of the ids, which the map keeps."""
    progress: Progress | None = None
    """Called while a large table is clustered."""

    def __post_init__(self) -> None:
        if self.num_ids < 1:
            raise ValueError(f"table {self.name!r}: {self.num_ids} ids, expected at least 1")
        for name in ("counts", "embedding"):
            value = getattr(self, name)
            if isinstance(value, torch.Tensor):
                if value.layout != torch.strided or value.is_quantized or value.device.type == "meta":
                    raise ValueError(
                        f"table {self.name!r}: {name} is a tensor of {value.layout} on {value.device.type!r}, expected "
                        "a dense tensor that holds values"
                    )
                if value.requires_grad or value.device.type != "cpu":  # a table's own weight: nothing trains it here
                    object.__setattr__(self, name, value.detach().cpu())
        if self.counts is not None:
            if self.counts.shape != (self.num_ids,):
                raise ValueError(
                    f"table {self.name!r}: counts have shape {tuple(self.counts.shape)}, expected ({self.num_ids},)"
                )
            bad = ~torch.isfinite(self.counts) | (self.counts < 0)
            if bool(bad.any()):
                row = int(bad.nonzero()[0])
                raise ValueError(
                    f"table {self.name!r}: the count of id {row} is {float(self.counts[row])}, "
                    "expected a finite number >= 0"
                )
        if self.embedding is not None and (len(self.embedding.shape) != 2 or self.embedding.shape[0] != self.num_ids):
            raise ValueError(
                f"table {self.name!r}: embedding has shape {tuple(self.embedding.shape)}, expected {self.num_ids} rows"
            )


Method = Callable[[IdTable, int, HashConfig], IdMap]
"""(ids, rows, config) -> map onto at most `rows` rows. Deterministic by config.seed.

Raises ValueError that names the table where it lacks the counts or the embedding that the method needs, where a
row of the embedding is not finite, or where the budget cannot be used.
"""


def check_budget(table: IdTable, rows: int) -> None:
    """Raise ValueError where a budget is below 1 or above the number of ids."""
    if not 1 <= rows <= table.num_ids:
        raise ValueError(f"table {table.name!r}: a budget of {rows} rows, expected 1 to {table.num_ids}, its ids")


def need_counts(table: IdTable, method: str) -> torch.Tensor:
    """The counts; raises ValueError where there are none."""
    if table.counts is None:
        raise ValueError(f"table {table.name!r}: method {method!r} needs the counts of its ids")
    return table.counts


def need_embedding(table: IdTable, method: str) -> RowSource:
    """The embedding; raises ValueError where there is none."""
    if table.embedding is None:
        raise ValueError(f"table {table.name!r}: method {method!r} needs an embedding of its ids")
    return table.embedding
