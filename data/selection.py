"""Which rows of a log are read, row group by row group: a sample of them, what is not in it, or all."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from recpress.data.sampling import selected, selected_count

if TYPE_CHECKING:
    from recpress.data.config import SampleConfig
    from recpress.data.rows import Rows


class Selection:
    """The rows of `rows` that are in a sample, or with `complement` those that are not; `sample=None` is all rows.

    `counts` is known without reading data, so that the order of an epoch is arithmetic. Safe to share between threads.

    Raises:
        InputError: a sample rate outside (0, 1].
    """

    def __init__(self, rows: Rows, sample: SampleConfig | None, complement: bool = False) -> None:
        self._rows, self._sample, self._complement = rows, sample, complement
        self.counts = np.array(
            [selected_count(sample, complement, group.file, group.group, group.num_rows) for group in rows.groups],
            dtype=np.int64,
        )
        """Selected rows of each row group, in the order of `rows.groups`. (groups,) int64"""

    @property
    def num_rows(self) -> int:
        return int(self.counts.sum())

    def of(self, group: int) -> np.ndarray | None:
        """Selected rows of `rows.groups[group]`: sorted int64 places in the row group, or None for all of them."""
        place = self._rows.groups[group]
        return selected(self._sample, self._complement, place.file, place.group, place.num_rows)
