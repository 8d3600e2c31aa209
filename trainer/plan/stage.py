"""`recpress plan`: sharding plan and memory of a training run on a cluster that need not exist."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from recpress.data.dataset import object_store
from recpress.modules.config import TwoTowerConfig
from recpress.trainer.config import network_for
from recpress.trainer.distributed.process_group import silence_library_warnings
from recpress.trainer.plan.config import ClusterConfig, PlanConfig, PlanModelConfig
from recpress.trainer.plan.export_size import export_bytes
from recpress.trainer.plan.job import Job, MapShape, job_of
from recpress.trainer.plan.label_job import LabelJob, label_job
from recpress.trainer.plan.memory import gib, peaks
from recpress.trainer.plan.meta_labelled import MetaLabelled
from recpress.trainer.plan.meta_model import MetaTowers, activation_bytes
from recpress.trainer.plan.show import layout_rows, show
from recpress.trainer.plan.sizing import Need, PlannedModel, assess, smallest


def plan(config: PlanConfig | PlanModelConfig) -> dict[str, Any]:
    """Print what the run needs; return all figures, and write them to `config.json`.

    Raises:
        InputError: the log, factors, maps or settings cannot be used. A run that does not fit is a result, no error.
    """
    silence_library_warnings()
    if isinstance(config, PlanModelConfig):
        return _plan_labelled(config)
    job = job_of(config)
    model = MetaTowers(job)
    need = assess(job, model, config.cluster, activation_bytes(job, model))
    others = variants(config, job) if config.compare else {}
    compared = {name: _variant(other, config.cluster) for name, other in others.items()}
    size = export_bytes(job, model)
    notes = [f"recpress export, with its default storage (int8): {gib(size)} GiB"]
    if job.network.negatives.reject_positives != "no" and not job.rows:
        notes.insert(0, "not counted: 8 bytes per interaction on every rank if positives are rejected; set --rows")
    described = (
        f"{job.user.ids:,} users, {job.item.ids:,} items, {f'{job.rows:,}' if job.rows else 'unknown'} rows; "
        f"batch {job.strides[0]:,} users and {job.strides[1]:,} items"
    )
    return _finished(config, described, model, need, compared, notes, export_bytes=size)


def _plan_labelled(config: PlanModelConfig) -> dict[str, Any]:
    job = label_job(config)
    model = MetaLabelled(job)
    need = assess(job, model, config.cluster, model.activations)
    others = label_variants(config, job) if config.compare else {}
    compared = {name: _variant(other, config.cluster) for name, other in others.items()}
    described = (
        f"{len(job.features.keys)} features in {len(list(model.table_shards()))} tables, {len(job.features.floats)} "
        f"floats, {f'{job.rows:,}' if job.rows else 'unknown'} rows; batch {job.batch_size:,} rows"
    )
    return _finished(config, described, model, need, compared, [])


def _finished(
    config: PlanConfig | PlanModelConfig,
    described: str,
    model: PlannedModel,
    need: Need,
    compared: dict[str, tuple[dict[str, Any], Need]],
    notes: Sequence[str],
    **more: Any,
) -> dict[str, Any]:
    """All figures, printed and written; `more` of them."""
    result = {
        "cluster": asdict(config.cluster),
        "fits": need.problem is None,
        "problem": need.problem,
        "lines": [asdict(line) for line in need.lines],
        "peaks": {place: peaks(need.lines, place) for place in ("device", "host")},
        "tables": layout_rows(model, need),
        **more,
        "variants": {name: row for name, (row, _) in compared.items()},
    }
    show(described, model, need, compared, notes)
    if config.json:
        object_store.write_bytes(config.json, (json.dumps(result, indent=1) + "\n").encode())
    return result


def variants(config: PlanConfig, job: Job) -> dict[str, Job]:
    """The run with trainable, frozen and hashed tables."""
    dim = job.dim or config.model.tables.dim
    share = sum(m.num_rows for m in job.maps) / sum(m.num_ids for m in job.maps) if job.maps else config.share
    rows_per_id = max((m.rows_per_id for m in job.maps), default=config.rows_per_id)

    def tables(strategy: Any, storage: Any = "fp32") -> TwoTowerConfig:
        model = network_for(strategy, config).model
        return replace(model, tables=replace(model.tables, strategy=strategy, storage=storage, dim=dim))

    trained = "random" if config.model.tables.strategy == "random" else "warm-start"
    way = f", {rows_per_id} rows per id" if rows_per_id > 1 else ""
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


def label_variants(config: PlanModelConfig, job: LabelJob) -> dict[str, LabelJob]:
    """The run with trainable tables, and with tables that are hashed to a share of their ids."""
    hashed = {
        table.name: MapShape(num_ids=table.num_ids, num_rows=max(1, round(table.num_ids * config.share)))
        for table in job.features.tables
    }
    found = {"as configured": job}
    if job.maps or any(table.frozen is not None for table in job.features.tables):
        found["trainable, without maps"] = job.with_tables({}, frozen=False)
    return found | {f"trainable, hashed to {100 * config.share:.3g} %": job.with_tables(hashed, frozen=False)}


def _variant(job: Job | LabelJob, cluster: ClusterConfig) -> tuple[dict[str, Any], Need]:
    model: PlannedModel
    if isinstance(job, LabelJob):
        model = MetaLabelled(job)
        activations = model.activations
    else:
        model = MetaTowers(job)
        activations = activation_bytes(job, model)
    need = assess(job, model, cluster, activations)
    found = smallest(job, model, cluster, activations)
    size = sum(t.nbytes(cluster.device == "cuda") for t in model.table_shards())
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
