"""Side tables: features of each user or item by dense id, also for sampled negatives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch

from recpress.data.dataset.columns import Column, Jagged, check_type, decode, is_dense
from recpress.data.errors import InputError


@dataclass
class JaggedColumn:
    """A list column of a batch."""

    values: torch.Tensor  # (sum of lengths,) int64
    lengths: torch.Tensor  # (B,) int64


@dataclass
class SideTable:
    """Features of all users, or of all items; row k is dense id k. Each rank has all of it in memory."""

    rows: int
    categorical: dict[str, torch.Tensor | tuple[torch.Tensor, torch.Tensor]]
    """Name -> values (rows,) int64; of lists: values, int32 or int64, and offsets (rows + 1,)."""
    float_names: list[str]
    floats: torch.Tensor | None
    """(rows, F) float32: each with mean 0 and variance 1 over the rows that have it, 0 where missing."""

    @classmethod
    def from_arrow(
        cls,
        table: pa.Table,
        categorical: Sequence[str] | None = None,
        floats: Sequence[str] | None = None,
        where: str = "side table",
    ) -> SideTable:
        """The features of a table, such as `Log.features("item")`.

        Args:
            categorical: columns of integers from 0, or lists of them; by default all columns of these types.
            floats: columns of numbers; by default all columns of floats.
            where: how errors name the table.

        Raises:
            InputError: a column is missing or of another type; a categorical column has a null, a negative number, or
                one that is far too large for the number of rows.
        """

        def named(given: Sequence[str] | None, role: str) -> list[str]:
            if given is not None:
                return list(given)
            return [field.name for field in table.schema if _kind(field.type) == role]

        found: dict[str, torch.Tensor | tuple[torch.Tensor, torch.Tensor]] = {}
        for name in named(categorical, "categorical"):
            column = Column(name, "categorical")
            check_type(column, table.schema, where)
            data = decode(column, table.column(name), where)
            values = data.values if isinstance(data, Jagged) else data
            if len(values) and not is_dense(largest := int(values.max()), len(values)):
                raise InputError(
                    f"{where}, column '{name}': id {largest} in {len(values)} values; expected ids numbered from 0, as "
                    "each of them up to the largest has a row in a table"
                )
            if isinstance(data, Jagged):
                found[name] = _tensor(data.values), _tensor(data.offsets)
            else:
                found[name] = _tensor(data)
        names = named(floats, "float")
        parts = []
        for name in names:
            column = Column(name, "float")
            check_type(column, table.schema, where)
            numbers = decode(column, table.column(name), where)
            assert isinstance(numbers, np.ndarray)
            parts.append(_standard(_tensor(numbers)))
        return cls(table.num_rows, found, names, torch.stack(parts, 1) if parts else None)

    def num_values(self) -> dict[str, int]:
        """Largest value + 1 of each categorical feature: the rows of its table."""
        flat = {name: data[0] if isinstance(data, tuple) else data for name, data in self.categorical.items()}
        return {name: int(data.max()) + 1 if len(data) else 1 for name, data in flat.items()}

    @property
    def has_lists(self) -> bool:
        """Whether a feature is a list of ids."""
        return any(isinstance(data, tuple) for data in self.categorical.values())

    def to(self, device: torch.device | str) -> SideTable:
        moved = {
            name: (data[0].to(device), data[1].to(device)) if isinstance(data, tuple) else data.to(device)
            for name, data in self.categorical.items()
        }
        floats = None if self.floats is None else self.floats.to(device)
        return SideTable(self.rows, moved, self.float_names, floats)

    def gather(self, ids: torch.Tensor) -> tuple[dict[str, torch.Tensor | JaggedColumn], torch.Tensor | None]:
        """Features of some ids, (B,) int64: categorical by name, and floats (B, F) or None.

        With lists on CUDA, the host waits for the number of their values.
        """
        found = {name: self.gather_one(name, ids) for name in self.categorical}
        return found, None if self.floats is None else self.floats[ids]

    def gather_one(self, name: str, ids: torch.Tensor) -> torch.Tensor | JaggedColumn:
        """One categorical feature of some ids, (B,) int64."""
        data = self.categorical[name]
        return _gather_lists(*data, ids) if isinstance(data, tuple) else data[ids]


def _gather_lists(values: torch.Tensor, offsets: torch.Tensor, ids: torch.Tensor) -> JaggedColumn:
    starts = offsets[ids]
    lengths = offsets[ids + 1] - starts
    ends = lengths.cumsum(0)
    total = int(ends[-1]) if len(ids) else 0
    shift = torch.repeat_interleave(starts - (ends - lengths), lengths, output_size=total)
    return JaggedColumn(values[shift + torch.arange(total, device=ids.device)].long(), lengths)


def _standard(column: torch.Tensor) -> torch.Tensor:
    missing = ~torch.isfinite(column)
    known = column[~missing].double()
    mean = known.mean() if len(known) else torch.tensor(0.0)
    deviation = known.std(correction=0) if len(known) else torch.tensor(0.0)
    scaled = (column.double() - mean) / (deviation if deviation > 0 else 1.0)
    return scaled.masked_fill(missing, 0.0).float()


def _tensor(array: np.ndarray) -> torch.Tensor:
    # Torch warns of the read-only memory of Arrow; a side table is copied once.
    return torch.from_numpy(array if array.flags.writeable else array.copy())


def _kind(kind: pa.DataType) -> str | None:
    lists = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    if pa.types.is_integer(kind) or (lists and pa.types.is_integer(kind.value_type)):
        return "categorical"
    return "float" if pa.types.is_floating(kind) else None
