"""Where the maps of `LearnedHash` lie in its buffers, and what follows from the order of a batch's keys."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from recpress.modules.hashing.id_map import universal_hash


@dataclass(frozen=True)
class PlacedMap:
    """One IdMap and where it lies in the module's buffers."""

    num_ids: int
    num_rows: int
    ways: int
    seed: int
    start: int
    """First entry in `rows`, or first bit in the packed words."""
    bits: int
    weight_start: int
    """First entry in `weights`; -1 where the map has none."""

    def hashed(self, ids: torch.Tensor) -> torch.Tensor:
        """Rows (n, ways) int32 of ids that the map does not cover."""
        return universal_hash(ids, self.num_rows, self.seed, self.ways)


class Layout:
    """What follows from the order of a batch's keys, and is the same for each batch that has it."""

    def __init__(self, keys: list[str], map_of: Mapping[str, PlacedMap]) -> None:
        maps = [map_of.get(key) for key in keys]
        self.keys = list(keys)
        self.ways = [1 if m is None else m.ways for m in maps]
        self.max_ways = max(self.ways)
        self.positions = [keys.index(key) for key in map_of]
        self.mapped_sizes = [None if m is None else m.num_ids for m in maps]
        self.weighted = any(m is not None and m.weight_start >= 0 for m in maps)
        self._per_key = {
            "sizes": [-1 if m is None else m.num_ids for m in maps],
            "starts": [-1 if m is None else m.start for m in maps],
        }
        self._tensors: dict[tuple[str, torch.device], torch.Tensor] = {}
        self.runs = _runs(maps)

    def entries(self, ids: torch.Tensor, lengths: list[int]) -> torch.Tensor:
        """Ids -> places in the rows of their map, `ways` for each id."""
        parts = [
            (part[:, None] * ways + torch.arange(ways, device=ids.device, dtype=ids.dtype)).reshape(-1)
            for part, ways in self._parts(ids, lengths)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def repeat(self, values: torch.Tensor, lengths: list[int]) -> torch.Tensor:
        """Values of ids -> of entries."""
        if self.max_ways == 1:
            return values
        parts = [part[:, None].expand(-1, ways).reshape(-1) for part, ways in self._parts(values, lengths)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _parts(self, values: torch.Tensor, lengths: list[int]) -> list[tuple[torch.Tensor, int]]:
        """Pieces whose ids all have the same number of rows."""
        if min(self.ways) == self.max_ways:
            return [(values, self.max_ways)]
        return list(zip(values.split(lengths), self.ways, strict=True))

    def per_id(self, name: str, lengths: list[int], like: torch.Tensor) -> torch.Tensor:
        """A number of each key, repeated for each of its ids: (n,) int64."""
        if torch.compiler.is_exporting():  # a tensor made while exporting must not outlive it
            values = torch.tensor(self._per_key[name], device=like.device)
        else:
            if (name, like.device) not in self._tensors:
                self._tensors[name, like.device] = torch.tensor(self._per_key[name], device=like.device)
            values = self._tensors[name, like.device]
        counts = torch.tensor(lengths, device=like.device)
        return torch.repeat_interleave(values, counts, output_size=like.numel())


def _runs(maps: list[PlacedMap | None]) -> list[tuple[int, torch.Tensor]]:
    """Split the keys into runs for fbgemm's `pruned_array_lookup`: (end of the run, where each map starts).

    That operator takes feature t's map from starts[t] on, and passes its ids through where starts[t + 1] is not
    larger. So in a run the starts ascend; a map that two features share begins a new run.
    """
    runs: list[tuple[int, torch.Tensor]] = []
    starts: list[int] = []
    end = 0  # of the last map in this run
    for index, one in enumerate(maps):
        if one is None:
            starts.append(end)
            continue
        if starts and one.start < end:
            runs.append((index, torch.tensor([*starts, end])))
            starts, end = [], 0
        # Features without a map before this one start where it starts, so that their range is empty.
        for back in range(len(starts) - 1, -1, -1):
            if starts[back] != end:
                break
            starts[back] = one.start
        starts.append(one.start)
        end = one.start + one.num_ids * one.ways
    runs.append((len(maps), torch.tensor([*starts, end])))
    return runs
