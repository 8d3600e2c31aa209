"""`recpress plan`: what a training run needs of a cluster that need not exist."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from recpress.modules.config import TwoTowerConfig
from recpress.trainer.config import network_for
from recpress.trainer.distributed.process_group import silence_library_warnings
from recpress.trainer.plan.activations import activation_bytes
from recpress.trainer.plan.asked import job_of
from recpress.trainer.plan.config import ClusterConfig, PlanConfig
from recpress.trainer.plan.job import Job
from recpress.trainer.plan.memory import peaks
from recpress.trainer.plan.shards import MetaTowers, tables_of
from recpress.trainer.plan.show import layout_rows, show
from recpress.trainer.plan.sizing import Need, assess, smallest


def plan(config: PlanConfig) -> dict[str, Any]:
    """Print what the run needs, and return all figures, which `config.json` gets too.

    Raises:
        InputError: the log, factors, maps or settings cannot be used. What does not fit is told, not raised.
    """
    silence_library_warnings()
    job = job_of(config)
    model = MetaTowers(job)
    activations = activation_bytes(job, model)
    need = assess(job, model, config.cluster, activations)
    if config.compare:
        compared = {name: _variant(other, config.cluster) for name, other in variants(config, job).items()}
    else:
        compared = {}
    result = {
        "cluster": asdict(config.cluster),
        "fits": need.problem is None,
        "problem": need.problem,
        "lines": [asdict(line) for line in need.lines],
        "peaks": {place: peaks(need.lines, place) for place in ("device", "host")},
        "tables": layout_rows(model, need),
        "variants": {name: row for name, (row, _) in compared.items()},
    }
    show(job, model, need, compared)
    if config.json:
        _write(Path(config.json), result)
    return result


def variants(config: PlanConfig, job: Job) -> dict[str, Job]:
    """The run with trainable, frozen and hashed tables."""
    dim = job.dim or config.model.tables.dim
    known = [side.map for side in (job.user, job.item) if side.map]
    share = sum(m.num_rows for m in known) / sum(m.num_ids for m in known) if known else config.share
    rows_per_id = max((m.rows_per_id for m in known), default=config.rows_per_id)

    def tables(strategy: Any, storage: Any = "fp32") -> TwoTowerConfig:
        model = network_for(strategy, config).model
        return replace(model, tables=replace(model.tables, strategy=strategy, storage=storage, dim=dim))

    trained = "random" if config.model.tables.strategy == "random" else "warm-start"
    way = f", {rows_per_id} rows an id" if rows_per_id > 1 else ""
    hashed = f"learned hash {100 * share:.3g} %{way}"
    return {
        "trainable": job.with_tables(tables(trained), None if trained == "random" else dim, None, 1),
        "frozen fp32": job.with_tables(tables("frozen"), dim, None, 1),
        "frozen int8": job.with_tables(tables("frozen", "int8"), dim, None, 1),
        f"{hashed}, trainable": job.with_tables(
            tables(trained), None if trained == "random" else dim, share, rows_per_id
        ),
        f"{hashed}, frozen fp32": job.with_tables(tables("frozen"), dim, share, rows_per_id),
        f"{hashed}, frozen int8": job.with_tables(tables("frozen", "int8"), dim, share, rows_per_id),
    }


def _variant(job: Job, cluster: ClusterConfig) -> tuple[dict[str, Any], Need]:
    model = MetaTowers(job)
    activations = activation_bytes(job, model)
    need = assess(job, model, cluster, activations)
    found = smallest(job, model, cluster, activations)
    size = sum(t.nbytes(cluster.device == "cuda") for t in tables_of(model))
    row = {
        "table_bytes": size,
        "maps_per_rank": sum(line.bytes for line in need.lines if line.name in ("maps", "log counts behind maps")),
        "peak_per_rank": need.rank_bytes(need.place),
        "host_peak_per_rank": need.rank_bytes("host"),
        "fits": need.problem is None,
        "problem": need.problem,
        "smallest": asdict(found),
    }
    return row, need


def _write(path: Path, result: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    part.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    os.replace(part, path)
