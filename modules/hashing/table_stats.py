"""What is known about the ids of a table: the input of every hashing method."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from recpress.modules.row_source import RowSource

ProgressFn = Callable[[str, int, int], None]
"""(stage, ids done, ids in total)."""


@dataclass(frozen=True, eq=False, kw_only=True)
class TableStats:
    """The ids of one table: how many, how frequent, and their embedding.

    Raises:
        ValueError: counts or embedding do not have `num_ids` rows; a count is negative or not finite.
    """

    name: str
    """Table that errors name."""
    num_ids: int
    counts: torch.Tensor | None = None
    """How often each id is accessed: (num_ids,), finite, >= 0. An array or a list becomes a float64 tensor."""
    embedding: RowSource | None = None
    """(num_ids, d) float32, read in blocks: factors, a table of the model, or the vectors of a warm-up."""
    vocabulary: str | None = None
    """Fingerprint of the ids. The map stores it."""
    progress: ProgressFn | None = None
    """Called while a large table is clustered."""

    def __post_init__(self) -> None:
        if self.num_ids < 1:
            raise ValueError(f"table {self.name!r}: {self.num_ids} ids, expected at least 1")
        if self.counts is not None and not isinstance(self.counts, torch.Tensor):
            try:
                counts = np.array(self.counts, dtype=np.float64)
            except (TypeError, ValueError) as error:
                raise ValueError(
                    f"table {self.name!r}: counts are no numbers ({error}), expected one per id, ({self.num_ids},)"
                ) from error
            object.__setattr__(self, "counts", torch.from_numpy(counts))
        for name in ("counts", "embedding"):
            value = getattr(self, name)
            if isinstance(value, torch.Tensor):
                if value.layout != torch.strided or value.is_quantized or value.device.type == "meta":
                    raise ValueError(
                        f"table {self.name!r}: {name} is a tensor of {value.layout} on {value.device.type!r}, expected "
                        "a dense tensor that holds values"
                    )
                if value.requires_grad or value.device.type != "cpu":  # a weight of a model: methods do not train it
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


def check_budget(table: TableStats, rows: int) -> None:
    """Raise ValueError if a budget is below 1 or above the number of ids."""
    if not 1 <= rows <= table.num_ids:
        raise ValueError(f"table {table.name!r}: a budget of {rows} rows, expected 1 to {table.num_ids}, its ids")


def require_counts(table: TableStats, method: str) -> torch.Tensor:
    """The counts. Raises ValueError if there are none."""
    if table.counts is None:
        raise ValueError(f"table {table.name!r}: method {method!r} needs the counts of its ids")
    return table.counts


def require_embedding(table: TableStats, method: str) -> RowSource:
    """The embedding. Raises ValueError if there is none."""
    if table.embedding is None:
        raise ValueError(f"table {table.name!r}: method {method!r} needs an embedding of its ids")
    return table.embedding
