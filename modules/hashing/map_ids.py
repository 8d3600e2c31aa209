"""Id maps in plain operators: for GPUs, and for torch.fx, TorchScript, torch.export and torch.compile.

These cannot trace the fast path of `LearnedHash` on a CPU. Here no branch depends on data.
"""

from __future__ import annotations

import torch
from torchrec import KeyedJaggedTensor

from recpress.modules.hashing.id_map import mixed
from recpress.modules.hashing.map_buffers import unpack
from recpress.modules.id_check import require


def map_entries(
    ids: torch.Tensor,
    unknown: torch.Tensor,
    numbers: torch.Tensor,
    rows: torch.Tensor,
    weights: torch.Tensor,
    packed: bool,
    weighted: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(rows, weights of the maps), one per entry. TorchScript compiles it.

    Args:
        ids, unknown: the id of each entry, and whether its map does not cover it, (entries,).
        numbers: (9, entries) int64, `map_buffers.column_numbers` of each entry.
        rows, weights, packed: of a `LearnedHash`.
        weighted: a map has weights.
    """
    start, step, place, mask, num_rows, offset, weight_start, rows_per_id, column = torch.unbind(numbers)
    mapped = start >= 0
    known = mapped & ~unknown
    at = torch.where(known, start + step * ids + place, 0)
    found = unpack(rows, at, mask) if packed else rows.index_select(0, at).long()
    found = torch.where(unknown, mixed(ids.long() + offset).remainder(num_rows), found)
    found = torch.where(mapped, found, ids)
    own: torch.Tensor | None = None
    if weighted:
        has_weight = known & (weight_start >= 0)
        at = torch.where(has_weight, weight_start + rows_per_id * ids + column, 0)
        own = torch.where(has_weight, weights.index_select(0, at).float(), 1.0)
    return found, own


@torch.fx.wrap
def map_ids(
    features: KeyedJaggedTensor,
    rows: torch.Tensor,
    weights: torch.Tensor,
    num_ids: dict[str, int],
    columns: dict[str, list[list[int]]],
    packed: bool,
    weighted: bool,
    uses_batch_weights: bool,
    reject: bool,
) -> KeyedJaggedTensor:
    """What `LearnedHash` gives for `features`. A leaf of torch.fx that TorchScript compiles.

    Args:
        rows, weights, packed: of a `LearnedHash`.
        num_ids, columns: feature key -> ids of its map, and `map_buffers.column_numbers` of each of its columns.
        weighted: a map has weights.
        uses_batch_weights: use the per-sample weights of the batch.
        reject: raise an error if a map does not cover an id, instead of hashing it.
    """
    keys, lengths, ids = features.keys(), features.length_per_key(), features.values()
    given = features.weights_or_none() if uses_batch_weights else None
    for key in num_ids:
        if key not in keys:
            raise ValueError(f"learned hash: the batch has no feature '{key}', which has a map; it has {keys}")
    id_parts: list[torch.Tensor] = []
    unknown_parts: list[torch.Tensor] = []
    number_parts: list[torch.Tensor] = []
    weight_parts: list[torch.Tensor] = []
    length_parts: list[torch.Tensor] = []
    entry_lengths: list[int] = []
    parts = torch.split(ids, lengths)
    strides = features.stride_per_key()
    for index, key in enumerate(keys):
        of_key = columns.get(key, [[-1, 0, 0, 0, 1, 0, -1, 1, 0]])
        count, part = len(of_key), parts[index]
        unknown = torch.zeros_like(part, dtype=torch.bool)
        if key in num_ids:
            unknown = (part < 0) | (part >= num_ids[key])
            if reject:
                require(
                    ~unknown.any(), f"learned hash: feature '{key}' has an id that is not in 0 to {num_ids[key] - 1}"
                )
        numbers = torch.tensor(of_key, device=ids.device).t()[:, None, :]
        number_parts.append(numbers.expand(-1, lengths[index], -1).reshape(9, -1))
        id_parts.append(part[:, None].expand(-1, count).reshape(-1))
        unknown_parts.append(unknown[:, None].expand(-1, count).reshape(-1))
        if given is not None:
            weight_parts.append(torch.split(given, lengths)[index][:, None].expand(-1, count).reshape(-1))
        length_parts.append(torch.split(features.lengths(), strides)[index] * count)
        entry_lengths.append(lengths[index] * count)
    found, own = map_entries(
        torch.cat(id_parts), torch.cat(unknown_parts), torch.cat(number_parts, 1), rows, weights, packed, weighted
    )
    if given is not None:
        given = torch.cat(weight_parts)
        own = given if own is None else own.to(given.dtype) * given
    if not torch.jit.is_scripting() and features.variable_stride_per_key():
        return KeyedJaggedTensor(
            keys=keys, values=found.to(ids.dtype), weights=own, lengths=torch.cat(length_parts),
            stride_per_key_per_rank=features.stride_per_key_per_rank(), length_per_key=entry_lengths,
            inverse_indices=features.inverse_indices_or_none(),
        )  # fmt: skip
    return KeyedJaggedTensor(
        keys=keys, values=found.to(ids.dtype), weights=own, lengths=torch.cat(length_parts),
        stride=features.stride(), length_per_key=entry_lengths,
    )  # fmt: skip
