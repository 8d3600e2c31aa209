"""Skips row groups that cannot be read or decoded (`stream.on_bad_file skip`), and names and counts them.

Which rows a step sees follows from the row counts of the footers alone, so that all ranks have the same steps. A row
group that turns out to be corrupt would leave a gap in one rank's batches. The stream fills it with the rows of another
row group of the sample, which the seed draws: steps, batch sizes and positions do not change, on any rank or after a
resume, and the replacing rows count twice in that epoch. Full passes over a log (counts of items, pairs of users) need
no equal sizes, and skip it.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

import numpy as np

from recpress.data.dataset.columns import Jagged
from recpress.data.dataset.parquet_split import ParquetSplit, RowGroup
from recpress.data.errors import InputError
from recpress.data.sampling.selection import Selection
from recpress.data.seeds import generator

if TYPE_CHECKING:
    from recpress.data.dataset.log import Log

logger = logging.getLogger(__name__)

TRIES = 8
"""Row groups that fail one after the other before the stream gives up: then it is the storage, and no file."""
GroupKey = tuple[int, int]
Lost = dict[GroupKey, int]
"""(file, row group) -> rows lost with it: all, until the stream reads it; then those of the sample."""


@dataclass(frozen=True)
class TolerantSplit(ParquetSplit):
    """A split whose corrupt row groups `read_or_skip` skips and records in `lost`."""

    lost: Lost = field(default_factory=dict)

    @classmethod
    def of(cls, rows: ParquetSplit, **more: object) -> TolerantSplit:
        """The same rows; what `rows` has lost already stays lost, in the same dictionary."""
        parts = {part.name: getattr(rows, part.name) for part in fields(cls) if hasattr(rows, part.name)}
        return cls(**parts | more)

    def read_or_skip(self, group: RowGroup, columns: Sequence[str]) -> dict[str, np.ndarray | Jagged] | None:
        if (group.file, group.group) in self.lost:
            return None
        try:
            return super().read(group, columns)
        except InputError as error:
            self.lose(group, error)
            return None

    def lose(self, group: RowGroup, error: InputError, rows: int | None = None) -> None:
        """Leave a row group out from here on, with so many rows, else all of it; says so, once a file."""
        named = any(file == group.file for file, _ in list(self.lost))  # a copy: other threads add to it
        self.lost[group.file, group.group] = group.num_rows if rows is None else rows
        if not named:
            logger.warning("skipping corrupt row group: %s (further ones of this file are not reported)", error)


def left_out(log: Log) -> dict[str, Any]:
    """What the manifest of what is made of a log says of files and row groups of train that were skipped so far;
    nothing where none may be."""
    if not isinstance(log.train, TolerantSplit):
        return {}
    lost = dict(log.train.lost)
    return {"bad_files": dict(log.bad_files), "bad_row_groups": len(lost), "lost_rows": sum(lost.values())}


def in_words(log: Log) -> str | None:
    """The same as a line for the end of a stage; None if nothing was skipped."""
    found = left_out(log)
    if not found or not (found["bad_files"] or found["bad_row_groups"]):
        return None
    return (
        f"{log.path}: skipped what could not be read: {len(found['bad_files'])} files, and {found['bad_row_groups']} "
        f"row groups of others, with {found['lost_rows']:,} rows"
    )


@dataclass(frozen=True)
class ReplacingSplit(TolerantSplit):
    """A split whose `read` replaces a corrupt row group by as many rows of another."""

    selection: Selection | None = None
    """Which rows are read; None: all."""
    seed: int = 0

    def read(self, group: RowGroup, columns: Sequence[str]) -> dict[str, np.ndarray | Jagged]:
        """As `ParquetSplit.read`; at the places of a damaged group's members stand members of another one.

        Raises InputError if TRIES others cannot be read either, or there is none.
        """
        found = self.read_or_skip(group, columns)
        return self._instead(group, columns) if found is None else found

    def _instead(self, group: RowGroup, columns: Sequence[str]) -> dict[str, np.ndarray | Jagged]:
        draw = generator(self.seed, "instead of", group.file, group.group)
        tries = 0
        for place in draw.permutation(len(self.groups)).tolist():
            other, members = self.groups[place], self._members(place)
            if (other.file, other.group) in self.lost or not len(members):
                continue
            found = self.read_or_skip(other, columns)
            if found is not None:
                wanted = self._members(self.groups.index(group))
                self.lost[group.file, group.group] = len(wanted)
                rows = np.full(group.num_rows, members[0])
                rows[wanted] = np.resize(draw.permutation(members), len(wanted))
                return {name: column.take(rows) for name, column in found.items()}
            tries += 1
            if tries == TRIES:
                break
        raise InputError(
            f"{self.where(group)}: cannot be read, and none that could stand in for it: {len(self.lost)} of "
            f"{len(self.groups)} row groups are lost"
        )

    def _members(self, place: int) -> np.ndarray:
        """The rows of `groups[place]` that are read."""
        members = self.selection.of(place) if self.selection is not None else None
        return np.arange(self.groups[place].num_rows) if members is None else members
