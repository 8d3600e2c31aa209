"""An id map as a TorchRec collision module, for models that use ManagedCollision collections."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torchrec import JaggedTensor
from torchrec.modules.mc_modules import ManagedCollisionModule

from recpress.modules.fingerprints import Fingerprinted
from recpress.modules.hashing.id_map import IdMap, Unknown, map_fingerprint
from recpress.modules.id_check import ChecksIds, IdCheck, host_reads

_PARTS = 2**10 * 3**3 * 5**2 * 7
"""Divisible by most numbers of ranks, for plans of clusters other than this one."""


class LearnedCollisionModule(Fingerprinted, ChecksIds, ManagedCollisionModule):
    """Replaces the ids of one table by the rows of its map, before they are sent to the rank that owns the row.

    TorchRec shards collision modules row-wise only, does not let two tables share a feature, and drops per-sample
    weights when it shards an EmbeddingBagCollection behind them. `LearnedHash` has none of these limits. Each rank has
    a replica of the map, and `state_dict` only its fingerprint, so that a checkpoint loads at any world size.

    Args:
        id_map: one unweighted row per id. The table behind it has `id_map.num_rows` rows.
        unknown: what to do with an id that the map does not cover: use the row of `IdMap.hashed`, or raise ValueError
            (on CUDA only when `id_check.check_ids` is called).

    Raises:
        ValueError: the map has several rows per id, or weights.
    """

    device: torch.device
    _output_segments_tensor: torch.Tensor

    def __init__(
        self,
        id_map: IdMap,
        *,
        device: torch.device | str = "cpu",
        unknown: Unknown = "hash",
        output_range: tuple[int, int] | None = None,
        output_segments: list[int] | None = None,
    ) -> None:
        """output_range and output_segments: rows of this rank and boundaries of all ranks. TorchRec sets them."""
        if id_map.rows_per_id != 1 or id_map.weights is not None:
            raise ValueError(
                f"collision module: the map has {id_map.rows_per_id} rows per id and "
                f"{'no ' if id_map.weights is None else ''}weights, expected one row and no weights; use LearnedHash"
            )
        if unknown not in ("hash", "error"):
            raise ValueError(f"collision module: unknown is {unknown!r}, expected 'hash' or 'error'")
        self._range = output_range or (0, id_map.num_rows)
        segments = output_segments or [0, id_map.num_rows]
        super().__init__(torch.device(device), segments)
        self._id_map, self.unknown, self._buckets = id_map, unknown, len(segments) - 1
        # Not persistent, because TorchRec makes a ShardedTensor of any other buffer, and the map is not sharded.
        self.register_buffer("_rows", id_map.rows.to(device), persistent=False)
        self.register_buffer("_segments", self._output_segments_tensor.clone(), persistent=False)
        self._check, self._table = IdCheck({"id": id_map.num_ids}), ""
        self.init_fingerprints({"map": map_fingerprint(id_map)})
        self._rows: torch.Tensor
        self._segments: torch.Tensor

    def describe_mismatch(self, name: str) -> str:
        return (
            f"collision module: the checkpoint was saved with another map of {self._id_map.num_ids} ids onto "
            f"{self._id_map.num_rows} rows, so its rows belong to other ids; use the map that it was trained with"
        )

    def unknown_count(self) -> int:
        """Ids that the map did not cover, on this rank, since construction."""
        return self._check.counts()["id"]

    def check_ids(self) -> None:
        """With `unknown="error"`, raise ValueError if the map did not cover an id. Waits for the device."""
        if self.unknown == "error" and (first := self._check.first()) is not None:
            raise ValueError(f"table {self._table!r}: the id {first[1]}, expected 0 to {self._id_map.num_ids - 1}")

    def preprocess(self, features: dict[str, JaggedTensor]) -> dict[str, JaggedTensor]:
        """Ids -> rows of the whole table. Runs on the rank that has the ids."""
        self.check_fingerprints()
        found = {}
        for name, feature in features.items():
            rows, _, unknown = self._id_map.look_up(feature.values(), self._rows)
            if unknown is not None:
                ids = feature.values()
                self._table = name
                self._check.out_of_range(ids, ["id"], [len(ids)])
                if host_reads(ids):
                    self.check_ids()
            found[name] = JaggedTensor(
                values=rows[:, 0],
                lengths=feature.lengths(),
                offsets=feature.offsets_or_none(),
                weights=feature.weights_or_none(),
            )
        return found

    def remap(
        self,
        features: dict[str, JaggedTensor],
        mutate_miss_lengths: bool = True,
        write_weights: torch.Tensor | None = None,
    ) -> dict[str, JaggedTensor]:
        """Nothing to do on the rank that owns the rows: `preprocess` has mapped the ids."""
        return features

    def profile(self, features: dict[str, JaggedTensor]) -> dict[str, JaggedTensor]:
        """The map is fixed; there is nothing to profile."""
        return features

    def forward(self, features: dict[str, JaggedTensor], mutate_miss_lengths: bool = True) -> dict[str, JaggedTensor]:
        return self.remap(self.preprocess(features))

    def evict(self) -> torch.Tensor | None:
        return None

    def output_size(self) -> int:
        """Rows of this rank."""
        return self._range[1] - self._range[0]

    def input_size(self) -> int:
        """Rows of the whole table. The exchange of ids finds the rank of a row by it."""
        return self._id_map.num_rows

    def buckets(self) -> int:
        """Parts into which TorchRec may split the rows. Before sharding, the planner needs a multiple of the ranks."""
        if self._buckets > 1:
            return self._buckets
        ranks = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        return math.lcm(_PARTS, ranks)

    def open_slots(self) -> torch.Tensor:
        return torch.zeros(1, dtype=torch.int64, device=self.device)

    def validate_state(self) -> None:
        """Replace the boundaries of the world size that wrote the checkpoint by those of this one."""
        self._output_segments_tensor.copy_(self._segments)

    def reset_inference_mode(self) -> None:
        """There is no training state to reset."""

    def rebuild_with_output_id_range(
        self,
        output_id_range: tuple[int, int],
        output_segments: list[int],
        device: torch.device | None = None,
    ) -> LearnedCollisionModule:
        return type(self)(
            self._id_map,
            device=device or self.device,
            unknown=self.unknown,
            output_range=output_id_range,
            output_segments=output_segments,
        )
