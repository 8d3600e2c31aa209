"""Maps of ids on the host: the same rows as `LearnedHash`, from memory-mapped maps, for data workers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from recpress.modules.hashing.id_map import IdMap, Unknown


class MappedHash:
    """The same rows as `LearnedHash`, on the host: one memory-mapped copy of the maps for all processes of a machine.

    Data workers apply it to ids before they make batches. It can be pickled: only the folders travel.

    Args:
        folders: feature key -> folder that `IdMap.save` wrote.
        unknown: as in `LearnedHash`.

    Raises:
        ValueError: a folder is not a whole map; when called, a feature without a map, or, for `unknown="error"`, an
            id that its map does not cover.
    """

    def __init__(self, folders: Mapping[str, str | Path], *, unknown: Unknown = "hash") -> None:
        if unknown not in ("hash", "error"):
            raise ValueError(f"mapped hash: unknown is {unknown!r}, expected 'hash' or 'error'")
        self.unknown = unknown
        self._folders = {key: str(folder) for key, folder in folders.items()}
        self._maps = {key: IdMap.load(folder) for key, folder in self._folders.items()}
        self._unknown = dict.fromkeys(self._maps, 0)

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
