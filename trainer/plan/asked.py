"""The run that `recpress plan` is asked about, from its options and the log, where there is one."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import cast

import torch

from recpress.data.config import SampleConfig
from recpress.data.dataset.log import Log, open_log
from recpress.data.dataset.object_store import is_remote
from recpress.data.errors import InputError
from recpress.data.sampling.selection import Selection
from recpress.trainer.artifacts.factors import FactorsArtifact, open_factors
from recpress.trainer.artifacts.id_maps import SIDES, open_maps
from recpress.trainer.config import chosen_schema, network_for
from recpress.trainer.model.two_tower import Features
from recpress.trainer.plan.config import PlanConfig
from recpress.trainer.plan.job import Job, MapShape, Side
from recpress.trainer.train.inputs import choose_sample


def job_of(config: PlanConfig) -> Job:
    """The run of these options.

    Raises:
        InputError: log, factors, maps or settings cannot be used.
    """
    log = open_log(config.data, chosen_schema(config.schema)) if config.data else None
    factors = open_factors(config.factors, log) if log and config.factors else None
    strategy = config.model.tables.strategy
    if strategy == "auto":  # factors that need not exist
        strategy = "frozen"
    config = cast(PlanConfig, network_for(strategy, config).resolved())
    if log is not None:
        config = replace(config, sample=choose_sample(config, log, factors))
    elif not config.sample.rate:
        config = replace(config, sample=SampleConfig(rate=0.1 if strategy.startswith("frozen") else 1.0))
    dim = None if strategy == "random" else _dim(config, factors)
    network = config
    if strategy == "random" and config.dim:
        tables = replace(config.model.tables, dim=config.dim)
        network = replace(config, model=replace(config.model, tables=tables))
    if log is None:
        rows, group = config.rows, 1 << 18
        sides = [Side(ids=config.users), Side(ids=config.items)]
        sampled = math.ceil(rows * config.sample.rate)
    else:
        rows, group = log.train.num_rows, max(g.num_rows for g in log.train.groups)
        sampled = Selection(log.train, config.sample).num_rows
        sides = _sides(config, log)
    if config.stream.batch_size < 1:
        raise InputError(f"stream.batch_size is {config.stream.batch_size}; expected at least 1")
    return Job(
        network=network,
        dim=dim,
        user=sides[0],
        item=sides[1],
        rows=rows,
        sampled=sampled,
        group_rows=min(group, rows) if rows else group,
        rejects=config.negatives.rejects(rows=rows, users=sides[0].ids, items=sides[1].ids, sample=config.sample),
        keep_best=config.evaluation.while_training,
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


def _sides(config: PlanConfig, log: Log) -> list[Side]:
    features = Features.of(log, config.user_features, config.item_features)
    maps = open_maps(config.hash, log).maps if config.hash else {}
    sides = []
    for side, table in (("user", features.user), ("item", features.item)):
        id_map = maps.get(side)
        tensors: list[torch.Tensor] = []
        if table is not None:
            for values in table.categorical.values():
                tensors += values if isinstance(values, tuple) else (values,)
            tensors += [] if table.floats is None else [table.floats]
        sides.append(
            Side(
                ids=log.num_ids(side),  # type: ignore[arg-type]
                map=None if id_map is None else MapShape.of(id_map),
                categorical={} if table is None else dict(table.num_values()),
                floats=0 if table is None else len(table.float_names),
                feature_bytes=sum(t.nbytes for t in tensors),
            )
        )
    return sides
