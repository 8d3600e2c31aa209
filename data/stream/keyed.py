"""Keyed batches for any TorchRec model, such as a DLRM: built from the rows of a stream, in the background."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.utils.data import IterableDataset, get_worker_info
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from torchrec.streamable import Pipelineable

from recpress.data.dataset.side_table import JaggedColumn
from recpress.data.errors import InputError
from recpress.data.stream.loader import Interactions, InteractionStream

Transform = Callable[[torch.Tensor], torch.Tensor]
"""Ids (n,) int64 -> as many ids, such as `recpress.modules.hashing.mapped_hash.MappedHash` of one feature."""


@dataclass
class KeyedBatch(Pipelineable):
    """B rows of a log, for a TorchRec pipeline."""

    features: KeyedJaggedTensor
    """One key per column, stride B; a scalar column has length 1 in each row."""
    dense: torch.Tensor | None
    """(B, F) float32, missing ones 0; None where the schema has no floats."""
    label: torch.Tensor | None
    """(B,) float32; None where the log has none."""

    def to(self, device: torch.device, non_blocking: bool = False) -> KeyedBatch:
        return self._each(lambda part: part.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> KeyedBatch:
        return self._each(lambda part: part.pin_memory())

    def record_stream(self, stream: torch.Stream) -> None:
        for part in (self.features, self.dense, self.label):
            if part is not None:
                part.record_stream(stream)

    def _each(self, move: Callable[..., object]) -> KeyedBatch:
        return KeyedBatch(*(None if part is None else move(part) for part in (self.features, self.dense, self.label)))


class Keyed:
    """Builds keyed batches from rows: `map(Keyed(["user_id", "item_id"]), stream)`.

    Scalar columns that are adjacent in memory are not copied; in the batches of a stream they are, in the order of its
    columns. Lengths and offsets of batches without lists are computed once.

    Args:
        keys: columns of the log, scalar or lists.
        transforms: for some of them, a function of their ids.
        pin_memory: page-locked results, from which CUDA copies during the computation.
    """

    def __init__(
        self, keys: Sequence[str], *, transforms: Mapping[str, Transform] | None = None, pin_memory: bool = False
    ) -> None:
        self.keys, self.transforms, self.pin = list(keys), dict(transforms or {}), pin_memory
        for name in self.transforms:
            if name not in self.keys:
                raise InputError(f"a transform of column '{name}'; expected one of the keys {', '.join(self.keys)}")
        self._ones: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def __call__(self, rows: Interactions) -> KeyedBatch:
        lists = {name: column for name, column in rows.categorical.items() if isinstance(column, JaggedColumn)}
        if any(name in lists for name in self.keys):
            features = self._with_lists(rows, lists)
        else:
            lengths, offsets = self._of_ones(rows.size)
            features = KeyedJaggedTensor(
                keys=self.keys,
                values=self._values(rows),
                lengths=lengths,
                offsets=offsets,
                stride=rows.size,
                length_per_key=[rows.size] * len(self.keys),
                offset_per_key=[rows.size * place for place in range(len(self.keys) + 1)],
            )
        dense = None if rows.floats is None else rows.floats.masked_fill(rows.floats.isnan(), 0.0)
        batch = KeyedBatch(features, dense, rows.label)
        return batch.pin_memory() if self.pin else batch

    def _values(self, rows: Interactions) -> torch.Tensor:
        """(keys * B,) int64, key by key."""
        if not self.transforms:
            for names, values in rows.tables:
                first = names.index(self.keys[0]) if self.keys[0] in names else len(names)
                if list(names[first : first + len(self.keys)]) == self.keys:
                    return values[first : first + len(self.keys)].reshape(-1)
        columns = self._scalars(rows, {})
        values = torch.empty(len(self.keys) * rows.size, dtype=torch.int64)
        for name, part in zip(self.keys, values.view(len(self.keys), rows.size), strict=True):
            part.copy_(self._transformed(name, columns[name]))
        return values

    def _with_lists(self, rows: Interactions, lists: dict[str, JaggedColumn]) -> KeyedJaggedTensor:
        columns, (ones, _) = self._scalars(rows, lists), self._of_ones(rows.size)
        values = [self._transformed(name, lists[name].values if name in lists else columns[name]) for name in self.keys]
        lengths = [lists[name].lengths if name in lists else ones[: rows.size] for name in self.keys]
        return KeyedJaggedTensor(
            keys=self.keys,
            values=torch.cat(values),
            lengths=torch.cat(lengths),
            stride=rows.size,
            length_per_key=[len(part) for part in values],
        )

    def _scalars(self, rows: Interactions, lists: Mapping[str, JaggedColumn]) -> dict[str, torch.Tensor]:
        """Columns by name. Raises InputError for a key that the rows do not have."""
        found = {name: column for names, values in rows.tables for name, column in zip(names, values, strict=True)}
        for name in self.keys:
            if name not in found and name not in lists:
                raise InputError(f"key '{name}': the rows have no such column; they have {', '.join([*found, *lists])}")
        return found

    def _transformed(self, name: str, ids: torch.Tensor) -> torch.Tensor:
        found = self.transforms[name](ids) if name in self.transforms else ids
        if found.shape != ids.shape:
            raise InputError(f"the transform of column '{name}' made {tuple(found.shape)} of {tuple(ids.shape)} ids")
        return found

    def _of_ones(self, stride: int) -> tuple[torch.Tensor, torch.Tensor]:
        if stride not in self._ones:
            if len(self._ones) > 16:
                self._ones.clear()
            total = len(self.keys) * stride
            self._ones[stride] = torch.ones(total, dtype=torch.int64), torch.arange(total + 1)
        return self._ones[stride]


class KeyedBatches(IterableDataset):
    """A stream as keyed batches, built ahead by a background thread.

    Each iteration is one epoch from `stream.set_epoch`'s place on, as of the stream itself. No DataLoader is needed; in
    `DataLoader(batches, batch_size=None, num_workers=n)` the batches and their order are the same for any `n`.

    Args:
        keys: by default user, item and categorical columns, as far as the stream reads them.
        transforms, pin_memory: see `Keyed`.

    Raises:
        InputError: a key that is no id or categorical column of the stream, a transform of another column; while
            iterating, what the stream raises, and `pin_memory` or persistent workers within a DataLoader.

    Example:
        >>> from recpress.data.config import Schema, StreamConfig
        >>> from recpress.data.dataset.log import open_log
        >>> from recpress.data.stream.loader import InteractionStream
        >>> log = open_log("runs/log", Schema(label="label"))
        >>> stream = InteractionStream(log.train, log.schema, StreamConfig(batch_size=100))
        >>> batches = KeyedBatches(stream, transforms={"item_id": lambda ids: ids % 10})
        >>> batch = next(iter(batches))
        >>> batch.features.keys(), batch.features.stride(), batch.label.shape
        (['user_id', 'item_id'], 100, torch.Size([100]))
        >>> int(batch.features["item_id"].values().max()) < 10
        True
    """

    def __init__(
        self,
        stream: InteractionStream,
        keys: Sequence[str] | None = None,
        *,
        transforms: Mapping[str, Transform] | None = None,
        pin_memory: bool = False,
    ) -> None:
        schema = stream.schema
        known = [name for name in (schema.user, schema.item, *schema.categorical) if name in stream.columns]
        for name in keys or ():
            if name not in known:
                raise InputError(f"key '{name}': expected an id or categorical column of {', '.join(known)}")
        self.stream = stream
        self.keyed = Keyed(known if keys is None else keys, transforms=transforms, pin_memory=pin_memory)

    def __len__(self) -> int:
        return len(self.stream)

    def __iter__(self) -> Iterator[KeyedBatch]:
        if self.keyed.pin and get_worker_info() is not None:
            raise InputError(
                "KeyedBatches(pin_memory=True) in a worker of a DataLoader, where CUDA cannot be used; "
                "expected DataLoader(pin_memory=True)"
            )
        return self.stream.map(self.keyed)
