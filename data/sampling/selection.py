"""Which rows of a log are read, row group by row group: a sample of them, what is not in it, or all."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np

from recpress.data.config import SampleConfig
from recpress.data.dataset.parquet_split import ParquetSplit
from recpress.data.sampling.bernoulli import check_rate, membership, num_members
from recpress.data.sampling.block_sample import BlockSample
from recpress.data.sampling.user_sample import UserSample
from recpress.data.seeds import key


class _Members(Protocol):
    """A sample of the rows of a log."""

    @property
    def counts(self) -> np.ndarray: ...  # members of each row group, (groups,) int64

    def members(self, group: int) -> np.ndarray | None: ...  # sorted int64 rows of it, None for all


class RowSample:
    """Each row independently (see `bernoulli`); costs no memory, and 10 ns per member for `counts`."""

    def __init__(self, rows: ParquetSplit, rate: float, seed: int) -> None:
        self._places = [(seed, rate, group.file, group.group, group.num_rows) for group in rows.groups]

    @cached_property
    def counts(self) -> np.ndarray:
        return np.array([num_members(*place) for place in self._places], dtype=np.int64)

    def members(self, group: int) -> np.ndarray | None:
        return membership(*self._places[group])


@dataclass(frozen=True)
class HoldOut:
    """Rows that are taken out of a selection, each independently with probability `rate`: a pure function of the seed,
    the row group and the row's position among the selected rows of its row group."""

    rate: float
    seed: int

    def place(self, rows: ParquetSplit, group: int, count: int) -> tuple[int, float, int, int, int]:
        """Arguments of `membership` for a row group with `count` selected rows."""
        where = rows.groups[group]
        return key("hold out", self.seed), self.rate, where.file, where.group, count


class Selection:
    """The rows of `rows` that are in a sample, or with `complement` those that are not; `sample=None` is all rows.
    With `hold_out`, without the rows that it takes out; `held_out` gives those.

    A pure function of the files and the sample, the same for every rank. Safe to share between threads.

    Raises:
        InputError: a sample rate outside (0, 1]; of a sample by user, what reading the column of users raises.
    """

    def __init__(
        self, rows: ParquetSplit, sample: SampleConfig | None, complement: bool = False, hold_out: HoldOut | None = None
    ) -> None:
        self._rows, self._hold_out = rows, hold_out
        self._sizes = np.array([group.num_rows for group in rows.groups], dtype=np.int64)
        self._complement = complement
        self._sample: _Members | None = None  # None: all rows
        if sample is not None and check_rate(sample.rate) < 1.0:
            if sample.kind == "block":
                self._sample = BlockSample(self._sizes.tolist(), sample.rate, sample.seed)
            elif sample.kind == "user":
                self._sample = UserSample(rows, sample.rate, sample.seed)
            else:
                self._sample = RowSample(rows, sample.rate, sample.seed)

    @cached_property
    def counts(self) -> np.ndarray:
        """Selected rows of each row group, in the order of `rows.groups`, known without reading them; computed at
        the first use. (groups,) int64"""
        drawn = self._drawn_counts
        if self._hold_out is None:
            return drawn.copy()
        places = (self._hold_out.place(self._rows, group, count) for group, count in enumerate(drawn.tolist()))
        return drawn - np.array([num_members(*place) for place in places], dtype=np.int64)

    @cached_property
    def _drawn_counts(self) -> np.ndarray:
        """`counts`, held-out rows included."""
        members = self._sizes if self._sample is None else self._sample.counts
        return self._sizes - members if self._complement else members

    @property
    def num_rows(self) -> int:
        return int(self.counts.sum())

    @property
    def candidates(self) -> np.ndarray:
        """Row groups that may have selected rows, without the draws that `counts` takes. Sorted int64"""
        if isinstance(self._sample, RowSample):
            return np.arange(len(self._sizes))
        return np.flatnonzero(self._drawn_counts)

    def of(self, group: int) -> np.ndarray | None:
        """Selected rows of `rows.groups[group]`: sorted int64 places in the row group, or None for all of them."""
        drawn = self._drawn(group)
        if self._hold_out is None:
            return drawn
        kept = np.ones(self._sizes[group] if drawn is None else len(drawn), dtype=bool)
        kept[self._held_out(group, len(kept))] = False
        return np.flatnonzero(kept) if drawn is None else drawn[kept]

    def held_out(self, group: int) -> np.ndarray:
        """Rows of `rows.groups[group]` that `hold_out` takes out: sorted int64 places in the row group."""
        drawn = self._drawn(group)
        if self._hold_out is None:
            return np.empty(0, dtype=np.int64)
        if drawn is None:
            return self._held_out(group, int(self._sizes[group]))
        return drawn[self._held_out(group, len(drawn))]

    def _held_out(self, group: int, count: int) -> np.ndarray:
        assert self._hold_out is not None
        return membership(*self._hold_out.place(self._rows, group, count))

    def _drawn(self, group: int) -> np.ndarray | None:
        """`of`, held-out rows included."""
        members = None if self._sample is None else self._sample.members(group)
        if not self._complement:
            return members
        if members is None:
            return np.empty(0, dtype=np.int64)
        if not len(members):
            return None
        others = np.ones(self._sizes[group], dtype=bool)
        others[members] = False
        return np.flatnonzero(others)
