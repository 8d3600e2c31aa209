"""The training run that `recpress plan` plans, with or without its log."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import cast

import torch

from recpress.data.config import SampleConfig
from recpress.data.dataset.log import SIDES, Log, open_log
from recpress.data.dataset.object_store import is_remote
from recpress.data.errors import InputError
from recpress.data.sampling.selection import Selection
from recpress.modules.config import TwoTowerConfig
from recpress.modules.hashing.id_map import IdMap
from recpress.trainer.artifacts.factors import FactorsArtifact, open_factors
from recpress.trainer.artifacts.id_maps import open_maps
from recpress.trainer.config import NetworkConfig, chosen_schema, network_for
from recpress.trainer.model.two_tower import Features
from recpress.trainer.plan.config import PlanConfig
from recpress.trainer.train.inputs import choose_sample


@dataclass(frozen=True, kw_only=True)
class MapShape:
    """The sizes of an IdMap."""

    num_ids: int
    num_rows: int
    rows_per_id: int = 1
    weight_bytes: int = 0
    """Of one weight; 0: the map has none."""

    @property
    def weights(self) -> bool | None:
        """As in IdMap: None if there are none."""
        return True if self.weight_bytes else None

    @classmethod
    def of(cls, id_map: IdMap) -> MapShape:
        width = 0 if id_map.weights is None else id_map.weights.element_size()
        return cls(num_ids=id_map.num_ids, num_rows=id_map.num_rows, rows_per_id=id_map.rows_per_id, weight_bytes=width)

    @property
    def nbytes(self) -> int:
        """As LearnedHash stores it: int32 rows, and the weights."""
        return self.num_ids * self.rows_per_id * (4 + self.weight_bytes)


@dataclass(frozen=True, kw_only=True)
class SideShape:
    """The sizes of users, or of items."""

    ids: int
    map: MapShape | None = None
    categorical: dict[str, int] = field(default_factory=dict)
    """Further categorical features of the side table: name -> number of values."""
    floats: int = 0
    feature_bytes: int = 0
    """Of the side table, which each rank stores."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """A training run."""

    network: NetworkConfig
    dim: int | None
    """Of the factors; None for `random`."""
    user: SideShape
    item: SideShape
    rows: int
    """Interactions of the log, before sampling; 0: unknown."""
    sampled: int
    """Of the sample; 0: unknown."""
    group_rows: int
    """Rows of the largest row group."""
    rejects: bool = False
    """Pairs of the log are in memory, so that no positive is drawn as a negative."""
    keep_best: bool = False
    """A copy of the best weights is in memory (evaluation.every, evaluation.every_steps)."""
    averages: bool = False
    """An average of the dense weights is in memory (ema)."""
    uploads: bool = False
    """Checkpoints go to an object store."""
    metrics: bool = False
    """TorchRec's metrics are computed."""
    row_vectors: bool = True
    """The vectors of the maps' rows are stored, so that ranks need not compute them."""

    @property
    def strides(self) -> tuple[int, int]:
        """Users and items of a batch of one rank."""
        batch, negatives = self.network.stream.batch_size, self.network.negatives
        if negatives.kind == "in-batch":
            return batch, batch
        return batch, batch + negatives.count * (1 if negatives.shared else batch)

    @property
    def batch_size(self) -> int:
        """Rows of a batch of one rank."""
        return self.network.stream.batch_size

    @property
    def sharding_types(self) -> dict[str, str]:
        """The planner chooses for all tables."""
        return {}

    @property
    def maps(self) -> list[MapShape]:
        return [side.map for side in (self.user, self.item) if side.map is not None]

    def with_tables(self, config: TwoTowerConfig, dim: int | None, share: float | None, rows_per_id: int) -> Job:
        """The same run with other tables; `share`: rows of maps as a share of the ids, None: without maps."""

        def mapped(side: SideShape) -> SideShape:
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


def job_of(config: PlanConfig) -> Job:
    """The run of these options.

    Raises:
        InputError: log, factors, maps or settings cannot be used.
    """
    log = open_log(config.data, chosen_schema(config.schema)) if config.data else None
    factors = open_factors(config.factors, log) if log and config.factors else None
    strategy = config.model.tables.strategy
    if strategy == "auto":  # as with factors, which need not exist
        strategy = "frozen"
    config = cast(PlanConfig, network_for(strategy, config).resolved())
    if config.stream.batch_size < 1:
        raise InputError(f"stream.batch_size is {config.stream.batch_size}; expected at least 1")
    if log is not None:
        config = replace(config, sample=choose_sample(config, log, factors))
        rows, group = log.train.num_rows, max(g.num_rows for g in log.train.groups)
        sampled = Selection(log.train, config.sample).num_rows
        user, item = _side_shapes(config, log)
    else:
        if not config.sample.rate:
            config = replace(config, sample=SampleConfig(rate=0.1 if strategy.startswith("frozen") else 1.0))
        rows, group = config.rows, 1 << 18
        sampled = math.ceil(rows * config.sample.rate)
        user, item = SideShape(ids=config.users), SideShape(ids=config.items)
    network = config
    if strategy == "random" and config.dim:
        tables = replace(config.model.tables, dim=config.dim)
        network = replace(config, model=replace(config.model, tables=tables))
    return Job(
        network=network,
        dim=None if strategy == "random" else _dim(config, factors),
        user=user,
        item=item,
        rows=rows,
        sampled=sampled,
        group_rows=min(group, rows) if rows else group,
        rejects=config.negatives.rejects(rows=rows, users=user.ids, items=item.ids, sample=config.sample),
        keep_best=config.evaluation.while_training,
        averages=config.ema is not None,
        uploads=is_remote(config.checkpoint.folder or config.out),
        metrics=bool(config.metrics.window),
        row_vectors=_row_vectors(config, log, factors),
    )


def _row_vectors(config: PlanConfig, log: Log | None, factors: FactorsArtifact | None) -> bool:
    """Whether `recpress train` finds the vectors of the maps' rows stored; cross-fitted ones never are."""
    frozen = config.model.tables.strategy.startswith("frozen")
    fits = factors is not None and log is not None and frozen and factors.has_not_seen(log, config.sample)
    if config.crossfit == "yes" or (config.crossfit == "auto" and fits):
        return False
    if not (log and config.hash):
        return True
    hashed = open_maps(config.hash, log)
    return all(hashed.rows(side) is not None for side in SIDES if side in hashed.maps)


def _dim(config: PlanConfig, factors: FactorsArtifact | None) -> int:
    if factors is not None and config.dim not in (0, factors.dim):
        raise InputError(f"dim is {config.dim}, but {factors.path} has {factors.dim}")
    return factors.dim if factors else config.dim or config.model.tables.dim


def _side_shapes(config: PlanConfig, log: Log) -> list[SideShape]:
    """Of users and of items."""
    features = Features.of(log, config.user_features, config.item_features)
    maps = open_maps(config.hash, log).maps if config.hash else {}
    shapes = []
    for side, table in (("user", features.user), ("item", features.item)):
        tensors: list[torch.Tensor] = []
        if table is not None:
            for values in table.categorical.values():
                tensors += values if isinstance(values, tuple) else (values,)
            tensors += [] if table.floats is None else [table.floats]
        length = config.model.tables.history_length if config.model.tables.history != "none" else 0
        lists = 4 * min(log.train.num_rows, log.num_users * length) + 8 * (log.num_users + 1) if length else 0
        shapes.append(
            SideShape(
                ids=log.num_ids(side),  # type: ignore[arg-type]
                map=MapShape.of(maps[side]) if side in maps else None,
                categorical={} if table is None else dict(table.num_values()),
                floats=0 if table is None else len(table.float_names),
                feature_bytes=sum(t.nbytes for t in tensors) + (lists if side == "user" else 0),
            )
        )
    return shapes
