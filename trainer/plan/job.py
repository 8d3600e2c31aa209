"""What a plan knows of a training run, with or without its log."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from recpress.modules.config import TwoTowerConfig
from recpress.modules.hashing.id_map import IdMap
from recpress.trainer.config import NetworkConfig


@dataclass(frozen=True, kw_only=True)
class MapShape:
    """The sizes of an IdMap, which is all that a plan needs of it."""

    num_ids: int
    num_rows: int
    rows_per_id: int = 1
    weight_bytes: int = 0
    """Of one weight; 0: the map has none."""

    @property
    def weights(self) -> bool | None:
        """As in IdMap: None where there are none."""
        return True if self.weight_bytes else None

    @classmethod
    def of(cls, id_map: IdMap) -> MapShape:
        width = 0 if id_map.weights is None else id_map.weights.element_size()
        return cls(num_ids=id_map.num_ids, num_rows=id_map.num_rows, rows_per_id=id_map.rows_per_id, weight_bytes=width)

    @property
    def nbytes(self) -> int:
        """As LearnedHash holds it: int32 rows, and the weights."""
        return self.num_ids * self.rows_per_id * (4 + self.weight_bytes)


@dataclass(frozen=True, kw_only=True)
class Side:
    """What is known of users, or of items."""

    ids: int
    map: MapShape | None = None
    categorical: dict[str, int] = field(default_factory=dict)
    """Further categorical features of the side table: name -> number of values."""
    floats: int = 0
    feature_bytes: int = 0
    """Of the side table, which each rank holds."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """A training run, with or without its log."""

    network: NetworkConfig
    dim: int | None
    """Of the factors; None for `random`."""
    user: Side
    item: Side
    rows: int
    """Interactions of the log, before sampling; 0: unknown."""
    sampled: int
    """Of the sample; 0: unknown."""
    group_rows: int
    """Rows of the largest row group."""
    rejects: bool = False
    """Pairs of the log are held in memory, so that no positive is drawn as a negative."""
    keep_best: bool = False
    """A copy of the best weights is held (evaluation.every, evaluation.every_steps)."""
    uploads: bool = False
    """Checkpoints lie on an object store."""
    metrics: bool = False
    """TorchRec's metrics are computed."""
    row_vectors: bool = True
    """The vectors of the maps' rows are stored beside them, and need not be worked out on each rank."""

    @property
    def strides(self) -> tuple[int, int]:
        """Users and items of a batch of one rank."""
        batch, negatives = self.network.stream.batch_size, self.network.negatives
        if negatives.kind == "in-batch":
            return batch, batch
        return batch, batch + negatives.count * (1 if negatives.shared else batch)

    def with_tables(self, config: TwoTowerConfig, dim: int | None, share: float | None, rows_per_id: int) -> Job:
        """The same run with other tables; `share`: behind maps to so many of the ids, None: without maps."""

        def mapped(side: Side) -> Side:
            if share is None:
                return replace(side, map=None)
            rows = max(1, round(side.ids * share))
            return replace(
                side,
                map=MapShape(
                    num_ids=side.ids, num_rows=rows, rows_per_id=rows_per_id, weight_bytes=2 if rows_per_id > 1 else 0
                ),
            )

        network = replace(self.network, model=config)
        return replace(self, network=network, dim=dim, user=mapped(self.user), item=mapped(self.item))
