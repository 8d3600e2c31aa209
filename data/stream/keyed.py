"""Keyed batches for any TorchRec model, such as a DLRM: built from the rows of a stream, in the background."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch.utils.data import get_worker_info
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from torchrec.streamable import Pipelineable

from recpress.data.dataset.side_table import JaggedColumn
from recpress.data.errors import InputError
from recpress.data.stream.keyed_features import KeyedFeatures
from recpress.data.stream.loader import Interactions, InteractionStream, ResumableDataset

Part = TypeVar("Part")

Transform = Callable[[torch.Tensor], torch.Tensor | tuple[torch.Tensor, torch.Tensor]]
"""Of a key: ids (n,) int64 -> as many ids (n,), or k rows per id (n, k), or those and their weights (n, k), such as
`recpress.modules.MappedHash` of one feature. Of a float column: values (B,) float32, NaN if missing -> values (B,),
such as `FloatTransform`."""


@dataclass
class KeyedBatch(Pipelineable):
    """B rows of a log, for a TorchRec pipeline. The fields have the names of TorchRec's own `Batch`."""

    dense_features: torch.Tensor | None
    """(B, F) float32, missing values 0; None if the stream reads no floats."""
    sparse_features: KeyedJaggedTensor
    """One key per column, stride B. An id of a scalar column has length 1 in each row, or k if its map has k rows."""
    labels: torch.Tensor | None
    """(B,) float32; None if the stream reads no label."""

    def to(self, device: torch.device, non_blocking: bool = False) -> KeyedBatch:
        return self._each(lambda part: part.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> KeyedBatch:
        return self._each(lambda part: part.pin_memory())

    def record_stream(self, stream: torch.Stream) -> None:
        for part in self._parts():
            if part is not None:
                part.record_stream(stream)

    def _parts(self) -> tuple[torch.Tensor | None, KeyedJaggedTensor, torch.Tensor | None]:
        return self.dense_features, self.sparse_features, self.labels

    def _each(self, move: Callable[..., object]) -> KeyedBatch:
        return KeyedBatch(*(None if part is None else move(part) for part in self._parts()))

    @property
    def dense(self) -> torch.Tensor | None:
        return self._renamed("dense", self.dense_features, "dense_features")

    @property
    def features(self) -> KeyedJaggedTensor:
        return self._renamed("features", self.sparse_features, "sparse_features")

    @property
    def label(self) -> torch.Tensor | None:
        return self._renamed("label", self.labels, "labels")

    def _renamed(self, old: str, value: Part, new: str) -> Part:
        warnings.warn(f"KeyedBatch.{old} is KeyedBatch.{new} now", DeprecationWarning, stacklevel=3)
        return value


class Keyed:
    """Builds keyed batches from rows: `map(Keyed(["user_id", "item_id"]), stream)`.

    Scalar columns that are adjacent in memory are not copied; in the batches of a stream they are, in the order of its
    columns. Lengths and offsets of batches without lists are computed once.

    Args:
        keys: columns of the log, scalar or lists.
        floats: columns of `dense_features`, in this order; by default all float columns of the rows.
        transforms: for some of the keys and floats, a `Transform`.
        pin_memory: page-locked results, from which CUDA copies during the computation.
    """

    def __init__(
        self,
        keys: Sequence[str],
        *,
        floats: Sequence[str] | None = None,
        transforms: Mapping[str, Transform] | None = None,
        pin_memory: bool = False,
    ) -> None:
        self.keys, self.floats, self.pin = list(keys), None if floats is None else list(floats), pin_memory
        self.transforms = dict(transforms or {})
        if not self.keys:
            raise InputError("no key; expected at least one id or categorical column")
        known = [*self.keys, *(self.floats or ())]
        for name, transform in self.transforms.items():
            if name not in known:
                raise InputError(f"a transform of column '{name}'; expected one of the columns {', '.join(known)}")
            if not callable(transform):
                raise InputError(
                    f"the transform of column '{name}' is a {type(transform).__name__}, expected a function"
                )
        self._shapes = KeyedFeatures()

    def __call__(self, rows: Interactions) -> KeyedBatch:
        batch = KeyedBatch(self._dense(rows), self._features(rows), rows.label)
        return batch.pin_memory() if self.pin else batch

    def _dense(self, rows: Interactions) -> torch.Tensor | None:
        if self.floats is None:
            return None if rows.floats is None else rows.floats.masked_fill(rows.floats.isnan(), 0.0)
        if not self.floats:
            return None
        columns = self._scalars(rows, {}, self.floats)
        values = torch.stack([self._transformed_floats(name, columns[name]) for name in self.floats], dim=1)
        return values.masked_fill_(values.isnan(), 0.0)

    def _transformed_floats(self, name: str, values: torch.Tensor) -> torch.Tensor:
        if name not in self.transforms:
            return values
        found = self.transforms[name](values)
        if not isinstance(found, torch.Tensor) or found.shape != values.shape:
            made = tuple(found.shape) if isinstance(found, torch.Tensor) else type(found).__name__
            raise InputError(f"the transform of column '{name}' made {made} of {tuple(values.shape)} floats")
        return found.float()

    def _features(self, rows: Interactions) -> KeyedJaggedTensor:
        if not self.transforms and (adjacent := self._adjacent(rows)) is not None:
            return self._of_scalars(rows.size, adjacent)
        lists = {name: column for name, column in rows.categorical.items() if isinstance(column, JaggedColumn)}
        columns = self._scalars(rows, lists, self.keys)
        values: list[torch.Tensor] = []
        weights: list[torch.Tensor | None] = []
        lengths: list[torch.Tensor] = []
        ones = self._shapes.ones(1, rows.size)[0]
        each_one = True
        for name in self.keys:
            ids, per_row = (lists[name].values, lists[name].lengths) if name in lists else (columns[name], ones)
            found, of_map = self._transformed(name, ids)
            count = found.shape[1] if found.ndim == 2 else 1
            each_one = each_one and count == 1 and name not in lists
            values.append(found.reshape(-1))
            weights.append(None if of_map is None else of_map.reshape(-1))
            lengths.append(per_row if count == 1 else per_row * count)
        weighted = any(part is not None for part in weights)
        if each_one and not weighted:
            return self._of_scalars(rows.size, torch.cat(values))
        parts = zip(weights, values, strict=True)
        return KeyedJaggedTensor(
            keys=self.keys,
            values=torch.cat(values),
            weights=torch.cat([torch.ones(len(ids)) if part is None else part for part, ids in parts])
            if weighted
            else None,
            lengths=torch.cat(lengths),
            stride=rows.size,
            length_per_key=[len(part) for part in values],
        )

    def _of_scalars(self, size: int, values: torch.Tensor) -> KeyedJaggedTensor:
        """Of (keys * B,) ids, key by key, one per row."""
        lengths, offsets = self._shapes.ones(len(self.keys), size)
        return KeyedJaggedTensor(
            keys=self.keys,
            values=values,
            lengths=lengths,
            offsets=offsets,
            stride=size,
            length_per_key=[size] * len(self.keys),
            offset_per_key=[size * place for place in range(len(self.keys) + 1)],
        )

    def _adjacent(self, rows: Interactions) -> torch.Tensor | None:
        """(keys * B,) int64, key by key, if the columns are adjacent in memory in this order."""
        for names, values in rows.tables:
            first = names.index(self.keys[0]) if self.keys[0] in names else len(names)
            if list(names[first : first + len(self.keys)]) == self.keys:
                return values[first : first + len(self.keys)].reshape(-1)
        return None

    def _scalars(
        self, rows: Interactions, lists: Mapping[str, JaggedColumn], needed: Sequence[str]
    ) -> dict[str, torch.Tensor]:
        """Columns by name. Raises InputError for one that the rows do not have."""
        found = {name: column for names, values in rows.tables for name, column in zip(names, values, strict=True)}
        for name in needed:
            if name not in found and name not in lists:
                kind = "key" if needed is self.keys else "float column"
                have = ", ".join([*found, *lists])
                raise InputError(f"{kind} '{name}': the rows have no such column; they have {have}")
        return found

    def _transformed(self, name: str, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Rows (n,) or (n, k) of ids (n,), and weights of the same shape or None."""
        if name not in self.transforms:
            return ids, None
        found = self.transforms[name](ids)
        rows, weights = found if isinstance(found, tuple) else (found, None)
        if rows.ndim not in (1, 2) or len(rows) != len(ids) or (weights is not None and weights.shape != rows.shape):
            made = tuple(rows.shape) if weights is None else f"{tuple(rows.shape)} with weights {tuple(weights.shape)}"
            raise InputError(
                f"the transform of column '{name}' made {made} of {tuple(ids.shape)} ids, expected (n,) or (n, k)"
            )
        return rows.to(torch.int64), weights


class KeyedBatches(ResumableDataset):
    """A stream as keyed batches, built ahead by a background thread.

    Each iteration is one epoch from `stream.set_epoch`'s place on, as of the stream itself. No DataLoader is needed; in
    `DataLoader(batches, batch_size=None, num_workers=n)` the batches and their order are the same for any `n`.

    Args:
        keys: by default user, item and categorical columns, as far as the stream reads them.
        floats: by default all float columns that the stream reads.
        transforms, pin_memory: see `Keyed`.

    Raises:
        InputError: a key that is no id or categorical column of the stream, a float that is no float column, a
            transform of another column; while iterating, what the stream raises, and `pin_memory` or persistent workers
            within a DataLoader.

    Example:
        >>> from recpress.data.config import Schema, StreamConfig
        >>> from recpress.data.dataset.log import open_log
        >>> from recpress.data.stream.loader import InteractionStream
        >>> log = open_log("runs/log", Schema(label="label"))
        >>> stream = InteractionStream(log.train, log.schema, StreamConfig(batch_size=100))
        >>> batches = KeyedBatches(stream, transforms={"item_id": lambda ids: ids % 10})
        >>> batch = next(iter(batches))
        >>> batch.sparse_features.keys(), batch.sparse_features.stride(), batch.labels.shape
        (['user_id', 'item_id'], 100, torch.Size([100]))
        >>> int(batch.sparse_features["item_id"].values().max()) < 10
        True
    """

    def __init__(
        self,
        stream: InteractionStream,
        keys: Sequence[str] | None = None,
        *,
        floats: Sequence[str] | None = None,
        transforms: Mapping[str, Transform] | None = None,
        pin_memory: bool = False,
    ) -> None:
        schema = stream.schema
        known = [name for name in (schema.user, schema.item, *schema.categorical) if name in stream.columns]
        known_floats = [name for name in schema.floats if name in stream.columns]
        for name in keys or ():
            if name not in known:
                raise InputError(f"key '{name}': expected an id or categorical column of {', '.join(known)}")
        for name in floats or ():
            if name not in known_floats:
                raise InputError(f"float column '{name}': expected one of {', '.join(known_floats) or 'none'}")
        if floats is None and any(name in known_floats for name in transforms or ()):
            floats = known_floats
        self.stream = stream
        self.keyed = Keyed(known if keys is None else keys, floats=floats, transforms=transforms, pin_memory=pin_memory)

    def __iter__(self) -> Iterator[KeyedBatch]:
        if self.keyed.pin and get_worker_info() is not None:
            raise InputError(
                "KeyedBatches(pin_memory=True) in a worker of a DataLoader, where CUDA cannot be used; "
                "expected DataLoader(pin_memory=True)"
            )
        return self._counted(self.stream.map(self.keyed))
