"""Maps of ids on the host: the same rows as `LearnedHash`, from memory-mapped maps, for data workers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, overload

import torch
from torchrec import KeyedJaggedTensor

from recpress.modules.hashing.id_map import IdMap, Unknown


class MappedHash:
    """The same rows as `LearnedHash`, on the host: one memory-mapped copy of the maps for all processes of a machine.

    Data workers apply it to ids before they make batches. It can be pickled: only the folders travel.

    Called with a KeyedJaggedTensor on the host it gives what `LearnedHash` gives: features without a map pass
    unchanged. With the map of one feature it can also be called with ids (n,), for the transform of a column:
    `KeyedBatches(stream, transforms={"user_id": MappedHash({"user_id": "maps/user"})})`. That needs a map of one row an
    id, without weights.

    Args:
        folders: feature key -> folder that `IdMap.save` wrote.
        unknown: as in `LearnedHash`.

    Raises:
        ValueError: a folder is not a whole map; when called, a feature without a map or that the batch lacks, ids alone
            where there are several maps or a map of several or weighted rows, or, for `unknown="error"`, an id that
            its map does not cover.

    Example:
        >>> mapped = MappedHash({"user_id": "runs/maps/user"})
        >>> rows, weights = mapped.rows("user_id", torch.tensor([3, 5]))
        >>> rows.shape, weights
        (torch.Size([2, 1]), None)
        >>> mapped(torch.tensor([3, 5])).shape
        torch.Size([2])
    """

    def __init__(self, folders: Mapping[str, str | Path], *, unknown: Unknown = "hash") -> None:
        if unknown not in ("hash", "error"):
            raise ValueError(f"mapped hash: unknown is {unknown!r}, expected 'hash' or 'error'")
        self.unknown = unknown
        self._folders = {key: str(folder) for key, folder in folders.items()}
        self._maps = {key: IdMap.load(folder) for key, folder in self._folders.items()}
        self._unknown = dict.fromkeys(self._maps, 0)

    @overload
    def __call__(self, features: torch.Tensor) -> torch.Tensor: ...

    @overload
    def __call__(self, features: KeyedJaggedTensor) -> KeyedJaggedTensor: ...

    def __call__(self, features: KeyedJaggedTensor | torch.Tensor) -> KeyedJaggedTensor | torch.Tensor:
        """Rows instead of ids, of the dtype that the ids had."""
        return self._one(features) if isinstance(features, torch.Tensor) else self._keyed(features)

    def _one(self, ids: torch.Tensor) -> torch.Tensor:
        if len(self._maps) != 1:
            raise ValueError(
                f"mapped hash: called with ids, which have no feature's name, and maps of {sorted(self._maps)}; "
                "expected a MappedHash of one feature, or a KeyedJaggedTensor"
            )
        [(key, id_map)] = self._maps.items()
        if id_map.ways != 1 or id_map.weights is not None:
            raise ValueError(
                f"mapped hash: the map of feature {key!r} has {id_map.ways} "
                f"{'weighted ' if id_map.weights is not None else ''}rows an id, which ids alone cannot become; "
                "call it with a KeyedJaggedTensor"
            )
        rows, _ = self.rows(key, ids)
        return rows.squeeze(1)

    def _keyed(self, features: KeyedJaggedTensor) -> KeyedJaggedTensor:
        keys, of_key = features.keys(), features.length_per_key()
        for key in self._maps:
            if key not in keys:
                raise ValueError(f"mapped hash: the batch has no feature {key!r}, which has a map; it has {keys}")
        given = features.weights_or_none()
        weighted = given is not None or any(id_map.weights is not None for id_map in self._maps.values())
        ones = torch.ones(len(features.values())) if given is None else given
        values, weights, lengths, each = [], [], [], []
        strides = features.stride_per_key()
        parts = features.values().split(of_key), ones.split(of_key), features.lengths().split(strides)
        for key, ids, own, length in zip(keys, *parts, strict=True):
            ways = 1
            if key in self._maps:
                rows, of_map = self.rows(key, ids)
                ways, ids = rows.shape[1], rows.reshape(-1)
                own = own.repeat_interleave(ways)
                own = own if of_map is None else of_map.reshape(-1).to(own.dtype) * own
            values.append(ids)
            weights.append(own)
            lengths.append(length * ways)
            each.append(len(ids))
        variable = features.variable_stride_per_key()
        return KeyedJaggedTensor(
            keys=keys,
            values=torch.cat(values),
            weights=torch.cat(weights) if weighted else None,
            lengths=torch.cat(lengths),
            stride=None if variable else features.stride(),
            stride_per_key_per_rank=features.stride_per_key_per_rank() if variable else None,
            length_per_key=each,
            inverse_indices=features.inverse_indices_or_none(),
        )

    def rows(self, key: str, ids: Any) -> tuple[Any, Any]:
        """Rows (n, ways) of ids (n,), and weights (n, ways) float32, None where the map has none.

        Rows are int32 for int32 ids, int64 for all other integers.

        numpy arrays for a numpy array, tensors for a tensor.
        """
        if key not in self._maps:
            raise ValueError(f"mapped hash: feature {key!r} has no map; there are {sorted(self._maps)}")
        id_map = self._maps[key]
        try:
            given = torch.as_tensor(ids)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"mapped hash: feature {key!r} has ids that are no integers (n,): {error}") from error
        if given.dtype == torch.uint64:  # torch has next to no operators for it
            given = given.view(torch.int64)  # what is above the largest int64 becomes negative: unknown, as it is
        integer = not (given.is_floating_point() or given.is_complex() or given.dtype == torch.bool)
        if given.ndim != 1 or not integer:
            raise ValueError(
                f"mapped hash: feature {key!r} has ids of {given.dtype} {tuple(given.shape)}, expected integers (n,)"
            )
        given = given if given.dtype == torch.int32 else given.long()
        rows, weights, unknown = look_up(id_map, given)
        if unknown is not None:
            if self.unknown == "error":
                first = int(given[int(unknown.nonzero()[0])])
                raise ValueError(f"mapped hash: feature {key!r} has the id {first}, expected 0 to {id_map.num_ids - 1}")
            self._unknown[key] += int(unknown.sum())
        if isinstance(ids, torch.Tensor):
            return rows, weights
        return rows.numpy(), None if weights is None else weights.numpy()

    def unknown_counts(self) -> dict[str, int]:
        """Feature key -> ids that the map did not cover, in this process."""
        return dict(self._unknown)

    def __getstate__(self) -> dict[str, Any]:
        return {"folders": self._folders, "unknown": self.unknown}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["folders"], unknown=state["unknown"])  # type: ignore[misc]


def look_up(
    id_map: IdMap, ids: torch.Tensor, rows_of: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """(rows (n, ways), weights (n, ways) or None, which ids the map does not cover (n,) or None) of ids (n,).

    rows_of: `id_map.rows` on another device, that of the ids. Synchronises where that is CUDA.
    """
    unknown, known = None, ids
    if len(ids):
        low, high = torch.aminmax(ids)
        if int(low) < 0 or int(high) >= id_map.num_ids:
            unknown = (ids < 0) | (ids >= id_map.num_ids)
            known = ids.masked_fill(unknown, 0)

    def of(table: torch.Tensor) -> torch.Tensor:
        columns = [table[:, way].index_select(0, known) for way in range(id_map.ways)]
        return columns[0][:, None] if len(columns) == 1 else torch.stack(columns, 1)

    rows = of(id_map.rows if rows_of is None else rows_of).to(ids.dtype)
    weights = None if id_map.weights is None else of(id_map.weights).float()
    if unknown is not None:
        rows = torch.where(unknown[:, None], id_map.hashed(ids).to(ids.dtype), rows)
        weights = None if weights is None else weights.masked_fill(unknown[:, None], 1.0)
    return rows, weights, unknown
