"""Rows of train for the statistics of columns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from recpress.data.dataset.log import Log
from recpress.data.dataset.parquet_split import iter_row_groups

SAMPLED_ROWS = 1 << 20
"""About as many rows of train, from row groups at even distances, give the statistics."""


def sampled_rows(log: Log, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    """These columns of row groups of train at even distances, about SAMPLED_ROWS rows."""
    groups = len(log.train.groups)
    count = max(1, min(groups, SAMPLED_ROWS * groups // log.train.num_rows))
    places = np.linspace(0, groups - 1, count).astype(int).tolist()
    for _, data in iter_row_groups(log.train, columns, sorted(set(places))):
        yield data
