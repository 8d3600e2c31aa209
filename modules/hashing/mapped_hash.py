"""Id maps on the host, for data workers: the same rows as `LearnedHash`, from memory-mapped files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, overload

import torch
from torchrec import KeyedJaggedTensor

from recpress.modules.hashing.id_map import IdMap, Unknown


class MappedHash:
    """The same rows as `LearnedHash`, on the host. All processes of a machine share one memory-mapped copy of the maps.

    Data workers apply it to ids before they make batches. A pickle contains only the folder names.

    A call with a KeyedJaggedTensor on the host gives what `LearnedHash` gives; features without a map pass unchanged.
    If there is one map, a call with ids (n,) transforms a column:
    `KeyedBatches(stream, transforms={"user_id": MappedHash({"user_id": "maps/user"})})`. It gives rows (n,) if the map
    has one row per id, rows (n, k) if it has k, and in a tuple with them their weights if the map is weighted.

    Args:
        folders: feature key -> folder that `IdMap.save` wrote.
        unknown: as in `LearnedHash`.

    Raises:
        ValueError: a folder is not a complete map. In a call: a feature has no map, or the batch lacks a feature; ids
            alone with several maps; with `unknown="error"`, a map does not cover an id.

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
    def __call__(self, features: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]: ...

    @overload
    def __call__(self, features: KeyedJaggedTensor) -> KeyedJaggedTensor: ...

    def __call__(
        self, features: KeyedJaggedTensor | torch.Tensor
    ) -> KeyedJaggedTensor | torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Rows in place of ids, of the dtype of the ids."""
        return self._one(features) if isinstance(features, torch.Tensor) else self._keyed(features)

    def _one(self, ids: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        if len(self._maps) != 1:
            raise ValueError(
                f"mapped hash: ids without a feature name are ambiguous with maps of {sorted(self._maps)}; "
                "expected a MappedHash of one feature, or a KeyedJaggedTensor"
            )
        rows, weights = self.rows(next(iter(self._maps)), ids)
        if weights is not None:
            return rows, weights
        return rows.squeeze(1) if rows.shape[1] == 1 else rows

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
            count = 1  # rows per id
            if key in self._maps:
                rows, of_map = self.rows(key, ids)
                count, ids = rows.shape[1], rows.reshape(-1)
                own = own.repeat_interleave(count)
                own = own if of_map is None else of_map.reshape(-1).to(own.dtype) * own
            values.append(ids)
            weights.append(own)
            lengths.append(length * count)
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
        """Rows (n, rows_per_id) of ids (n,), and weights (n, rows_per_id) float32 or None if the map has none.

        Rows are int32 for int32 ids, int64 for all other integers. A numpy array gives numpy arrays, a tensor tensors.
        """
        if key not in self._maps:
            raise ValueError(f"mapped hash: feature {key!r} has no map; features with maps: {sorted(self._maps)}")
        id_map = self._maps[key]
        try:
            given = torch.as_tensor(ids)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"mapped hash: feature {key!r} has ids that are not integers (n,): {error}") from error
        if given.dtype == torch.uint64:  # torch has almost no operators for it
            given = given.view(torch.int64)  # ids above the largest int64 become negative, and are unknown either way
        integer = not (given.is_floating_point() or given.is_complex() or given.dtype == torch.bool)
        if given.ndim != 1 or not integer:
            raise ValueError(
                f"mapped hash: feature {key!r} has ids of {given.dtype} {tuple(given.shape)}, expected integers (n,)"
            )
        given = given if given.dtype == torch.int32 else given.long()
        rows, weights, unknown = id_map.look_up(given)
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
