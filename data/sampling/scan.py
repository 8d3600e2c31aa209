"""Columns of a log row group by row group, for stages that need no shuffled order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from recpress.data.config import SampleConfig
from recpress.data.dataset.columns import Jagged
from recpress.data.dataset.parquet_split import ParquetSplit, iter_row_groups
from recpress.data.sampling.selection import Selection


def iter_columns(
    rows: ParquetSplit,
    columns: Sequence[str],
    *,
    rank: int = 0,
    world: int = 1,
    sample: SampleConfig | None = None,
    complement: bool = False,
) -> Iterator[dict[str, np.ndarray | Jagged]]:
    """The given columns, a row group at a time, each row group to exactly one rank (the j-th to rank j mod
    world, of those that may have selected rows; the others are not read).

    Args:
        sample: only the rows that are in this sample; with `complement` only those that are not.

    Raises:
        InputError: see `ParquetSplit.read`.
    """
    selection = Selection(rows, sample, complement)
    for group, data in iter_row_groups(rows, columns, selection.candidates[rank::world].tolist()):
        chosen = selection.of(group)
        yield data if chosen is None else {name: column.take(chosen) for name, column in data.items()}
