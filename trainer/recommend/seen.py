"""The items that users have seen, in memory: 4 bytes per row of the log of this rank's users."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from recpress.data.dataset.log import Log
from recpress.data.dataset.parquet_split import ParquetSplit
from recpress.data.sampling.scan import iter_columns
from recpress.trainer.distributed.collectives import exchange, rank_and_world
from recpress.trainer.distributed.rank_errors import raise_on_all_ranks
from recpress.trainer.evaluate.heldout import SEEN
from recpress.trainer.recommend.parts import Share
from recpress.trainer.recommend.users import Users


class SeenItems:
    """Seen items of the users of this rank, in rows of the log's `train` and `val` parts; may have duplicates.

    The log is read twice, so that the lists fit exactly: `count` first, and then `read`. Both are collective.
    """

    def __init__(self, log: Log, users: Users, share: Share) -> None:
        self._log, self._users, self._share = log, users, share
        self._offsets = np.zeros(share.slots + 1, dtype=np.int64)
        self._items = np.empty(0, dtype=np.int32)

    @property
    def nbytes(self) -> int:
        """Memory of the lists, and of the row groups that are read, once `count` has returned."""
        groups = [group.num_rows for rows in self._splits() for group in rows.groups]
        return 4 * int(self._offsets[-1]) + 16 * len(self._offsets) + 96 * max(groups, default=0)

    def count(self) -> int:
        """Count the items of each user; the number of users of this rank without any."""
        counts = np.zeros(self._share.slots, dtype=np.int64)
        for slots, _ in self._pairs():
            counts += np.bincount(slots, minlength=len(counts))
        np.cumsum(counts, out=self._offsets[1:])
        return int(np.sum(counts[self._share.filled] == 0))

    def read(self) -> None:
        """Fill the lists."""
        self._items = np.empty(self._offsets[-1], dtype=np.int32)
        free = self._offsets[:-1].copy()
        for slots, items in self._pairs():
            order = np.argsort(slots, kind="stable")
            slots, items = slots[order], items[order]
            counts = np.bincount(slots, minlength=len(free))
            within = np.arange(len(slots)) - (np.cumsum(counts) - counts)[slots]
            self._items[free[slots] + within] = items
            free += counts

    def of(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """(number of items of each of the slots [start, stop), the items)."""
        offsets = self._offsets[start : stop + 1]
        return np.diff(offsets), self._items[offsets[0] : offsets[-1]]

    def _splits(self) -> list[ParquetSplit]:
        return [rows for part in SEEN if (rows := getattr(self._log, part)) is not None]

    def _pairs(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(slot, item) of rows of users of this rank. Every rank reads some row groups and sends the rows to their
        owners."""
        rank, world = rank_and_world()
        schema = self._log.schema
        for rows in self._splits():
            mine = iter_columns(rows, [schema.user, schema.item], rank=rank, world=world)
            for _ in range(-(-len(rows.groups) // world)):
                slots, owner = np.empty(0, np.int64), np.empty(0, np.int64)
                items = np.empty(0, np.int32)
                with raise_on_all_ranks():
                    if (data := next(mine, None)) is not None:
                        user, item = data[schema.user], data[schema.item]
                        assert isinstance(user, np.ndarray)
                        assert isinstance(item, np.ndarray)
                        owner, slots = self._share.locate(self._users.positions(user))
                        wanted = owner >= 0
                        owner, slots, items = owner[wanted], slots[wanted], item[wanted].astype(np.int32)
                slots, items = exchange([slots, items], owner)
                yield slots, items
