"""Apply id maps before any embedding tables: KeyedJaggedTensor -> KeyedJaggedTensor, no parameters.

`mapped_hash.MappedHash` gives the same rows on the host, for data workers.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import fbgemm_gpu  # noqa: F401  (registers torch.ops.fbgemm)
import numpy as np
import torch
from torchrec import KeyedJaggedTensor

from recpress.modules.fingerprints import Fingerprinted
from recpress.modules.hashing.id_map import IdMap, Unknown, map_fingerprint
from recpress.modules.hashing.map_buffers import BatchLayout, MapSlot, column_numbers, pack, unpack
from recpress.modules.hashing.map_ids import map_entries, map_ids
from recpress.modules.id_check import ChecksIds, IdCheck, host_reads, is_traced, per_id
from recpress.modules.stack import on_stack

torch.fx.wrap("map_ids")  # a leaf where this module calls it

_CHUNK = 1 << 16
"""Ids of a packed map to unpack at once on a CPU, so that the intermediate tensors stay in its cache."""

_PIPELINE_CHECKS = 10
"""Forwards in training that check for a pipeline, which may start after some steps without it."""


class LearnedHash(Fingerprinted, ChecksIds):
    """Replaces the ids of some features by the rows of smaller tables. Other features pass unchanged.

    An id becomes `rows_per_id` entries: with two, lengths double, and sum pooling adds the two rows. Per-sample weights
    are multiplied by the weights of the map, if it has any; a weighted map makes an unweighted batch weighted.

    Each rank has a replica of the maps, int32 or bit-packed, in plain tensors that are not part of `state_dict`.
    Features with the same IdMap share its memory. `state_dict` has a fingerprint of each map, 16 bytes per feature.
    With `TrainPipelineSparseDist` use `pipeline_postproc=True`.

    Args:
        maps: feature key -> its map.
        unknown: what to do with an id that is negative or not below the map's `num_ids`: use the rows of
            `IdMap.hashed` with weight 1 ("hash"), or raise ValueError ("error"). The host does not wait for a GPU: on
            CUDA and in a compiled model "error", too, uses hashed rows, and `check_ids` raises.
        packed: bit-pack the maps to `IdMap.bits` bits per entry. Smaller but slower.

    Raises:
        ValueError: there is no map. In forward: the batch lacks a feature that has a map, or, with `unknown="error"`
            on a CPU, a map does not cover an id. When loading a checkpoint, or at the latest in the next forward: the
            checkpoint was saved with other maps.

    Example:
        >>> id_map = IdMap(rows=torch.tensor([[0], [1], [0]], dtype=torch.int32), num_rows=2)
        >>> features = KeyedJaggedTensor(["item"], torch.tensor([2, 1]), lengths=torch.tensor([1, 1]))
        >>> LearnedHash({"item": id_map})(features).values()  # for tables of `id_map.num_rows` rows
        tensor([0, 1])
    """

    uses_batch_weights = True
    """Whether the per-sample weights of the batch count."""

    def __init__(self, maps: Mapping[str, IdMap], *, unknown: Unknown = "hash", packed: bool = False) -> None:
        super().__init__()
        if not maps:
            raise ValueError("learned hash: no maps, expected at least one feature with a map")
        if unknown not in ("hash", "error"):
            raise ValueError(f"learned hash: unknown is {unknown!r}, expected 'hash' or 'error'")
        self.unknown, self.packed = unknown, packed
        self._slots: dict[str, MapSlot] = {}
        placed: dict[IdMap, MapSlot] = {}
        start = weight_start = 0
        for key, id_map in maps.items():
            if id_map not in placed:  # IdMaps compare by identity
                weighted = id_map.weights is not None
                placed[id_map] = MapSlot(
                    num_ids=id_map.num_ids,
                    num_rows=id_map.num_rows,
                    rows_per_id=id_map.rows_per_id,
                    seed=id_map.seed,
                    start=start,
                    bits=id_map.bits,
                    weight_start=weight_start if weighted else -1,
                )
                start += id_map.rows.numel() * (id_map.bits if packed else 1)
                weight_start += id_map.rows.numel() * weighted
            self._slots[key] = placed[id_map]
        rows = pack(placed) if packed else torch.cat([m.rows.reshape(-1) for m in placed])
        weights = [m.weights.reshape(-1) for m in placed if m.weights is not None]
        # Not buffers, which DistributedDataParallel would broadcast in every forward.
        self.rows = rows if len(rows) else torch.zeros(1, dtype=torch.int32)
        self.weights = torch.cat(weights) if weights else torch.ones(1)
        self._columns = {
            key: [column_numbers(slot, column, packed) for column in range(slot.rows_per_id)]
            for key, slot in self._slots.items()
        }
        self._check = IdCheck({key: slot.num_ids for key, slot in self._slots.items()})
        self._layouts: dict[tuple[str, ...], BatchLayout] = {}
        prints = {id_map: map_fingerprint(id_map) for id_map in placed}
        self.init_fingerprints({key: prints[id_map] for key, id_map in maps.items()})
        self.tables: dict[str, list[str]] = {}
        """Feature key -> the tables that it looks up, for error messages."""
        self._checks_left = _PIPELINE_CHECKS

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Any:
        """Move the maps as buffers move. Their dtype stays, and `to_empty` does not erase them."""
        device = fn(torch.empty(0, device=self.rows.device)).device
        if device.type != "meta":
            self.rows, self.weights = self.rows.to(device), self.weights.to(device)
        return super()._apply(fn, recurse)

    def _check_pipeline(self) -> None:
        """Warn once if a TorchRec pipeline runs the model, but not this module ahead of it."""
        self._checks_left -= 1
        pipeline = on_stack("TrainPipelineSparseDist", "torchrec.distributed.train_pipeline.train_pipelines")
        if pipeline is None:
            return
        self._checks_left = 0
        if on_stack("PipelinedPostproc", "torchrec.distributed.train_pipeline.postproc") is None:
            warnings.warn(
                f"learned hash: {type(pipeline).__name__} does not run it ahead of the model, so the tables behind it "
                "do not overlap their exchange with computation; pass pipeline_postproc=True",
                stacklevel=3,
            )

    def describe_mismatch(self, name: str) -> str:
        tables = " and ".join(repr(table) for table in self.tables.get(name, ()))
        return (
            f"id map of feature {name!r}{f' (table {tables})' if tables else ''}: the checkpoint was saved with "
            "another map, so its rows belong to other ids; use the map that it was trained with"
        )

    def unknown_counts(self) -> dict[str, int]:
        """Feature key -> ids that the map did not cover, since construction or `reset_unknown_counts`.

        Counts this rank only, and not the calls of a program made by torch.export. Waits for the device.
        """
        return self._check.counts()

    def reset_unknown_counts(self) -> None:
        self._check.reset()

    def check_ids(self) -> None:
        """With `unknown="error"`, raise ValueError if a map did not cover an id. Waits for the device."""
        if self.unknown == "error" and (first := self._check.first()) is not None:
            raise self._unknown_error(*first)

    def _unknown_error(self, key: str, found: int) -> ValueError:
        return ValueError(
            f"learned hash: feature {key!r} has the id {found}, expected 0 to {self._slots[key].num_ids - 1}"
        )

    def nbytes(self) -> int:
        """Bytes of the maps and their weights on this rank."""
        weighted = any(m.weight_start >= 0 for m in self._slots.values())
        return self.rows.nbytes + (self.weights.nbytes if weighted else 0)

    def rows_per_id(self, key: str) -> int:
        """Entries per id of this feature."""
        return self._slots[key].rows_per_id if key in self._slots else 1

    def options(self) -> tuple[dict[str, int], dict[str, list[list[int]]], bool, bool, bool]:
        """The arguments of `map_ids` after its tensors, without `reject`."""
        weighted = any(slot.weight_start >= 0 for slot in self._slots.values())
        return self._check.sizes, self._columns, self.packed, weighted, self.uses_batch_weights

    def forward(self, features: KeyedJaggedTensor) -> KeyedJaggedTensor:
        """The same keys, stride and order, with rows in place of ids. Rows have the dtype of the ids."""
        if is_traced(features):
            return self._traced(features)
        self.check_fingerprints()
        if self._checks_left and self.training:
            self._check_pipeline()
        layout = self._layout(features.keys())
        lengths = features.length_per_key()
        ids = features.values()
        weights = features.weights_or_none() if self.uses_batch_weights else None
        if ids.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"learned hash: the ids of the batch are {ids.dtype}, expected torch.int64 or torch.int32")
        rows, of_map = (self._on_host if host_reads(ids) else self._on_device)(ids, layout, lengths)
        if layout.max_rows_per_id > 1 and weights is not None:
            weights = layout.repeat(weights, lengths)
        if of_map is not None:
            weights = of_map if weights is None else of_map.to(weights.dtype) * weights
        return _rebuilt(features, rows.to(ids.dtype), weights, layout.entry_lengths(lengths), layout)

    def _traced(self, features: KeyedJaggedTensor) -> KeyedJaggedTensor:
        """Programs of torch.compile count unknown ids, as on a GPU; other programs have no state, so they raise."""
        counts = torch.compiler.is_compiling() and not torch.compiler.is_exporting()
        if counts:
            self._check.out_of_range(features.values(), features.keys(), features.length_per_key())
        reject = self.unknown == "error" and not counts
        return map_ids(features, self.rows, self.weights, *self.options(), reject)

    def _on_device(
        self, ids: torch.Tensor, layout: BatchLayout, lengths: list[int]
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(rows, weights of the maps or None), one per entry: a few operations for all features, and no waiting."""
        unknown = self._check.out_of_range(ids, layout.keys, lengths)
        numbers = layout.numbers(lengths, ids.device)
        ids, unknown = layout.repeat(ids, lengths), layout.repeat(unknown, lengths)
        return map_entries(ids, unknown, numbers, self.rows, self.weights, self.packed, layout.weighted)

    def _on_host(
        self, ids: torch.Tensor, layout: BatchLayout, lengths: list[int]
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As `_on_device`, with the least work for a CPU."""
        entries = layout.entry_lengths(lengths)
        unknown, how_many = self._unknown_ids(ids, layout, lengths)
        known = ids if unknown is None else ids.masked_fill(unknown, 0)  # every map has an id 0
        if layout.max_rows_per_id > 1:
            known = layout.entries(known, lengths)
        rows = (self._unpack if self.packed else self._gather)(known, layout, entries)
        weights = None
        if layout.weighted:
            again = None if unknown is None else layout.repeat(unknown, lengths)
            weights = self._weigh(known, again, layout, entries)
        if unknown is not None:
            self._hash(rows, ids, unknown, how_many, layout, lengths)
        return rows, weights

    def _layout(self, keys: list[str]) -> BatchLayout:
        found = self._layouts.get(tuple(keys))
        if found is None:
            missing = [key for key in self._slots if key not in keys]
            if missing:
                raise ValueError(
                    f"learned hash: the batch has no feature {missing[0]!r}, which has a map; it has {keys}"
                )
            found = self._layouts[tuple(keys)] = BatchLayout(keys, self._slots, self.packed)
        return found

    def _unknown_ids(
        self, ids: torch.Tensor, layout: BatchLayout, lengths: list[int]
    ) -> tuple[torch.Tensor | None, list[int]]:
        """(which ids of mapped features their map does not cover, (n,) bool, or None; how many of each key).

        Adds them to the counts.
        """
        bad, found = _unknown_on_host(ids, layout, lengths)
        if not found:
            return None, []
        if self.unknown == "error":
            position = int(bad.nonzero()[0])
            key = layout.keys[int(np.searchsorted(np.cumsum(lengths), position, side="right"))]
            raise self._unknown_error(key, int(ids[position]))
        per_key = torch.stack([part.sum() for part in bad.split(lengths)])
        self._check.add(per_key[layout.positions])
        return bad, per_key.tolist()

    def _gather(self, known: torch.Tensor, layout: BatchLayout, lengths: list[int]) -> torch.Tensor:
        """One fbgemm call per run of features whose maps have ascending positions; usually one call in all."""
        parts: list[torch.Tensor] = []
        at = first = 0
        for last, starts in layout.runs:
            ends = np.cumsum([0, *lengths[first:last]])
            part = known[at : at + int(ends[-1])]
            at += int(ends[-1])
            offsets = torch.from_numpy(ends).to(part.dtype)
            parts.append(torch.ops.fbgemm.pruned_array_lookup(part.contiguous(), offsets, self.rows, starts))
            first = last
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _unpack(self, known: torch.Tensor, layout: BatchLayout, lengths: list[int]) -> torch.Tensor:
        parts: list[torch.Tensor] = []
        for key, part in zip(layout.keys, known.split(lengths), strict=True):
            slot = self._slots.get(key)
            if slot is None:
                parts.append(part)
                continue
            mask = torch.tensor((1 << slot.bits) - 1)
            for chunk in part.split(_CHUNK):
                bit = chunk.long() * slot.bits + slot.start
                parts.append(unpack(self.rows, bit, mask).to(known.dtype))
        return torch.cat(parts)

    def _weigh(
        self,
        known: torch.Tensor,
        unknown: torch.Tensor | None,
        layout: BatchLayout,
        lengths: list[int],
    ) -> torch.Tensor:
        parts: list[torch.Tensor] = []
        for index, part in enumerate(known.split(lengths)):
            slot = self._slots.get(layout.keys[index])
            if slot is None or slot.weight_start < 0:
                parts.append(torch.ones_like(part, dtype=torch.float32))
                continue
            of_map = self.weights[slot.weight_start : slot.weight_start + slot.num_ids * slot.rows_per_id]
            parts.append(of_map.index_select(0, part).float())
        own = torch.cat(parts) if len(parts) > 1 else parts[0]
        return own if unknown is None else own.masked_fill(unknown, 1.0)

    def _hash(
        self,
        rows: torch.Tensor,
        ids: torch.Tensor,
        unknown: torch.Tensor,
        how_many: list[int],
        layout: BatchLayout,
        lengths: list[int],
    ) -> None:
        """Overwrite the rows of unknown ids by hashed rows."""
        split = rows.split(layout.entry_lengths(lengths)), ids.split(lengths), unknown.split(lengths)
        for key, number, row, part, bad in zip(layout.keys, how_many, *split, strict=True):
            slot = self._slots.get(key)
            if slot is None or not number:
                continue
            row = row.view(-1, slot.rows_per_id)
            where = bad.nonzero()[:, 0]
            row.index_copy_(0, where, slot.hashed(part.index_select(0, where)).to(row.dtype))


def _unknown_on_host(ids: torch.Tensor, layout: BatchLayout, lengths: list[int]) -> tuple[torch.Tensor, bool]:
    """(which ids their map does not cover, whether there are any). The first is empty if there are none.

    The smallest and largest id of a feature cost a tenth of its look-up; they tell whether a mask is needed.
    """
    bad, found, at = torch.empty(0, dtype=torch.bool), False, 0
    for size, length in zip(layout.num_ids, lengths, strict=True):
        if size is not None and length:
            part = ids[at : at + length]
            low, high = torch.aminmax(part)
            if int(low) < 0 or int(high) >= size:
                bad = bad if found else torch.zeros(ids.shape, dtype=torch.bool)
                found = True
                torch.bitwise_or(part < 0, part >= size, out=bad[at : at + length])
        at += length
    return bad, found


def _rebuilt(
    features: KeyedJaggedTensor,
    values: torch.Tensor,
    weights: torch.Tensor | None,
    length_per_key: list[int],
    layout: BatchLayout,
) -> KeyedJaggedTensor:
    """`features` with other values, and with everything that it has already computed."""
    lengths, offsets = features.lengths_or_none(), features.offsets_or_none()
    if layout.max_rows_per_id > 1:
        counts = per_id(layout.key_rows_per_id(values.device), features.stride_per_key())[0]
        lengths, offsets = features.lengths() * counts.to(features.lengths().dtype), None
    variable = features.variable_stride_per_key()
    return KeyedJaggedTensor(
        keys=features.keys(),
        values=values,
        weights=weights,
        lengths=lengths,
        offsets=offsets,
        stride=None if variable else features.stride(),
        stride_per_key_per_rank=features.stride_per_key_per_rank() if variable else None,
        length_per_key=length_per_key,
        inverse_indices=features.inverse_indices_or_none(),
    )
