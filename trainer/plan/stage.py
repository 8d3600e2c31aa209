"""`recpress plan`: what a training run needs of a cluster that need not exist."""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from recpress.data.errors import InputError
from recpress.data.log import Log, open_log
from recpress.data.selection import Selection
from recpress.data.storage import is_remote
from recpress.modules.config import TwoTowerConfig
from recpress.trainer.artifacts import FactorsArtifact, open_factors
from recpress.trainer.config import chosen_schema
from recpress.trainer.distributed.process_group import _quiet_libraries
from recpress.trainer.hash.id_maps import SIDES, open_maps
from recpress.trainer.model.sharding import RESERVED, planner, sharders
from recpress.trainer.model.two_tower import Features
from recpress.trainer.plan.config import ClusterConfig, PlanConfig
from recpress.trainer.plan.memory import (
    Job,
    Line,
    MapShape,
    MetaTowers,
    Shard,
    Side,
    activation_bytes,
    even_shards,
    peak,
    peaks,
    rank_lines,
    shards_by_rank,
    tables_of,
)
from tabulate import tabulate  # type: ignore[import-untyped]
from torchrec.distributed.planner import Topology
from torchrec.distributed.planner.types import PlannerError
from torchrec.distributed.types import ShardingPlan

GIB = 1 << 30
MOST_RANKS = 1 << 14
"""Where the search for the smallest cluster ends."""
CHECKED_RANKS = 1 << 9
"""Up to so many ranks the planner checks what the search found; its own time grows with their number."""


@dataclass(frozen=True)
class Need:
    """What a run needs of a cluster."""

    cluster: ClusterConfig
    lines: list[Line]
    """Of the rank that needs most."""
    layout: ShardingPlan | None
    """TorchRec's; None where its planner found none."""
    problem: str | None
    """Why it does not fit."""

    @property
    def place(self) -> str:
        return "device" if self.cluster.device == "cuda" else "host"

    def rank_bytes(self, place: str) -> int:
        """Peak of the rank that needs most."""
        return peak(self.lines, place)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Smallest:
    """The smallest cluster of such nodes that a run fits on."""

    ranks: int | None
    """None: no number of ranks is enough."""
    checked: bool
    """Whether TorchRec's planner found a plan for it."""
    why: str = ""


def plan(config: PlanConfig) -> dict[str, Any]:
    """Print what the run needs, and return all figures, which `config.json` gets too.

    Raises:
        InputError: the log, factors, maps or settings cannot be used. What does not fit is told, not raised.
    """
    _quiet_libraries()
    job = _job(config)
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
        "tables": _layout_rows(model, need),
        "variants": {name: row for name, (row, _) in compared.items()},
    }
    _show(job, model, need, compared)
    if config.json:
        _write(Path(config.json), result)
    return result


def assess(job: Job, model: MetaTowers, cluster: ClusterConfig, activations: int) -> Need:
    """Plan by TorchRec's planner, and add up the memory of the rank that needs most."""
    world, cuda = cluster.world, cluster.device == "cuda"
    options = {"world": world, "cuda": cuda, "context": int(cluster.context_gib * GIB), "activations": activations}
    layout, problem = _layout(job, model, cluster)
    if layout is None:
        lines = rank_lines(job, model, even_shards(model, world), **options)  # type: ignore[arg-type]
        return Need(cluster, lines, None, problem)
    candidates: dict[tuple[Shard, ...], list[Line]] = {}
    for shards in shards_by_rank(model, layout, world):
        key = tuple(sorted(shards, key=lambda s: (s.table, s.rows, s.width)))
        if key not in candidates:
            candidates[key] = rank_lines(job, model, shards, **options)  # type: ignore[arg-type]
    place = "device" if cuda else "host"
    lines = max(candidates.values(), key=lambda found: peak(found, place))  # type: ignore[arg-type]
    return Need(cluster, lines, layout, _shortage(lines, cluster))


def _shortage(lines: list[Line], cluster: ClusterConfig) -> str | None:
    """Why a rank with these parts does not fit; None where it does."""
    host = peak(lines, "host") * cluster.ranks_per_node
    if cluster.device == "cuda" and peak(lines, "device") > cluster.memory_gib * GIB:
        return f"a rank needs {_gib(peak(lines, 'device'))} GiB of its GPU's {cluster.memory_gib:g}"
    if host > cluster.host_memory_gib * GIB:
        each = f"{cluster.ranks_per_node} ranks x {_gib(peak(lines, 'host'))} GiB"
        return f"a node needs {_gib(host)} GiB ({each}) of its {cluster.host_memory_gib:g}"
    return None


def _capacity(cluster: ClusterConfig) -> float:
    """Bytes of the memory that a rank's tables lie in."""
    if cluster.device == "cuda":
        return cluster.memory_gib * GIB
    return cluster.host_memory_gib * GIB / cluster.ranks_per_node


def _layout(job: Job, model: MetaTowers, cluster: ClusterConfig) -> tuple[ShardingPlan | None, str | None]:
    speeds = {"intra_host_bw": cluster.intra_gb_s * 1e6, "inter_host_bw": cluster.inter_gb_s * 1e6}  # bytes a ms
    caps = {"ddr_cap": int(cluster.host_memory_gib * GIB / cluster.ranks_per_node)}
    if cluster.device == "cuda":
        caps["hbm_cap"] = int(cluster.memory_gib * GIB)
    ranks = Topology(cluster.world, cluster.device, local_world_size=cluster.ranks_per_node, **caps, **speeds)
    try:
        chosen = planner(model, ranks, batch_size=job.network.stream.batch_size)
        return chosen.plan(model, sharders()), None
    except PlannerError:
        cap = _gib(_capacity(cluster))
        need = _gib(sum(s.nbytes(cluster.device == "cuda") for s in even_shards(model, cluster.world)))
        share = f"{100 * (1 - RESERVED):.0f} %"
        return None, f"TorchRec's planner finds no plan: tables of {need} GiB a rank, expected at most {share} of {cap}"


def smallest(job: Job, model: MetaTowers, cluster: ClusterConfig, activations: int) -> Smallest:
    """The fewest ranks: up to one node any number, then whole nodes. By bisection with tables cut evenly; at the end
    TorchRec's planner is asked, and asked for more where it finds no plan."""
    node = cluster.ranks_per_node
    options = {"cuda": cluster.device == "cuda", "context": int(cluster.context_gib * GIB), "activations": activations}

    def shape(step: int) -> ClusterConfig:
        """The step-th size: 1, 2, ... ranks of one node, then 2, 3, ... nodes."""
        if cluster.device == "cpu":  # memory goes with the node, so that ranks of a node are not added one by one
            return replace(cluster, nodes=step)
        if step <= node:
            return replace(cluster, nodes=1, ranks_per_node=step)
        return replace(cluster, nodes=step - node + 1)

    def shortage(step: int) -> str | None:
        at = shape(step)
        shards = even_shards(model, at.world)
        stored = sum(s.nbytes(at.device == "cuda") for s in shards)
        lines = rank_lines(job, model, shards, world=at.world, **options)  # type: ignore[arg-type]
        if stored > (1 - RESERVED) * _capacity(at):
            return "tables"
        return _shortage(lines, at)

    last = max(node, MOST_RANKS // node)
    # The looked-up vectors grow with the ranks, so that more of them can be too many: double up to the first that fits.
    high = 1
    while shortage(high) is not None:
        if high >= last:
            return Smallest(None, False, shortage(last) or "")
        high = min(2 * high, last)
    low = high // 2  # does not fit, or is 0
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if shortage(middle) is None else (middle, high)
    for step in range(high, high + 4):
        at = shape(step)
        if at.world > CHECKED_RANKS:
            return Smallest(shape(high).world, False)
        if assess(job, model, at, activations).problem is None:
            return Smallest(at.world, True)
    return Smallest(None, False, "TorchRec's planner finds no plan near the estimate")


def variants(config: PlanConfig, job: Job) -> dict[str, Job]:
    """The run with trainable, frozen and hashed tables."""
    dim = job.dim or config.model.tables.dim
    known = [side.map for side in (job.user, job.item) if side.map]
    share = sum(m.num_rows for m in known) / sum(m.num_ids for m in known) if known else config.share
    ways = max((m.ways for m in known), default=config.ways)

    def tables(strategy: Any, storage: Any = "fp32") -> TwoTowerConfig:
        return replace(config.model, tables=replace(config.model.tables, strategy=strategy, storage=storage, dim=dim))

    trained = "random" if config.model.tables.strategy == "random" else "init-train"
    way = f", {ways} rows an id" if ways > 1 else ""
    hashed = f"learned hash {100 * share:.3g} %{way}"
    return {
        "trainable": job.with_tables(tables(trained), None if trained == "random" else dim, None, 1),
        "frozen fp32": job.with_tables(tables("init-freeze"), dim, None, 1),
        "frozen int8": job.with_tables(tables("init-freeze", "int8"), dim, None, 1),
        f"{hashed}, trainable": job.with_tables(tables(trained), None if trained == "random" else dim, share, ways),
        f"{hashed}, frozen fp32": job.with_tables(tables("init-freeze"), dim, share, ways),
        f"{hashed}, frozen int8": job.with_tables(tables("init-freeze", "int8"), dim, share, ways),
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


# ---- the run that is asked for


def _job(config: PlanConfig) -> Job:
    log = open_log(config.data, chosen_schema(config.schema)) if config.data else None
    factors = open_factors(config.factors, log) if log and config.factors else None
    strategy = config.model.tables.strategy
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
        keep_best=config.evaluation.while_training,
        uploads=is_remote(config.checkpoint.folder or config.out),
        metrics=bool(config.metrics.window),
        row_vectors=_row_vectors(config, log, factors),
    )


def _row_vectors(config: PlanConfig, log: Log | None, factors: FactorsArtifact | None) -> bool:
    """Whether `recpress train` finds the vectors of the maps' rows stored; cross-fitted ones never are."""
    frozen = config.model.tables.strategy.startswith("init-freeze")
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


# ---- what is shown


def _show(job: Job, model: MetaTowers, need: Need, compared: dict[str, tuple[dict[str, Any], Need]]) -> None:
    cluster = need.cluster
    unit = "GPU" if cluster.device == "cuda" else "rank"
    memory = f"{cluster.memory_gib:g} GiB each, " if cluster.device == "cuda" else ""
    print(
        f"cluster: {cluster.nodes:,} x {cluster.ranks_per_node} = {cluster.world:,} {unit}s, {memory}"
        f"{cluster.host_memory_gib:g} GiB a node\nlog: {job.user.ids:,} users, {job.item.ids:,} items, "
        f"{f'{job.rows:,}' if job.rows else 'unknown'} rows; "
        f"batch {job.strides[0]:,} users and {job.strides[1]:,} items"
    )
    print("\nSharding plan (TorchRec's planner)")
    if need.layout is None:
        print(need.problem)
    else:
        print(tabulate(_layout_rows(model, need), headers="keys"))
    print(f"\nMemory of a rank, MiB, of the rank that needs most{'' if need.layout else ' (tables cut evenly)'}")
    when = {
        "always": "always",
        "run": "load, train",
        "setup": "set up",
        "load": "load",
        "train": "train",
        "checkpoint": "checkpoint",
    }
    for place in ("device", "host"):
        rows = [
            (line.name, round(line.bytes / (1 << 20), 1), when[line.phase], line.formula)
            for line in need.lines
            if line.place == place
        ]
        if not rows:
            continue
        print(f"\n{'on the GPU' if place == 'device' else 'in host memory'}")
        print(tabulate(rows, headers=("part", "MiB", "when", "formula"), floatfmt=",.1f"))
        at = {moment: f"{_gib(size)} GiB" for moment, size in peaks(need.lines, place).items()}
        print(
            f"peak {_gib(need.rank_bytes(place))} GiB (set up {at['setup']}, load {at['load']}, train {at['train']}, "
            f"checkpoint {at['checkpoint']})"
        )
    if job.network.negatives.reject_positives and not job.rows:
        print("\nnot counted: 8 bytes an interaction on every rank, for --negatives.reject-positives; give --rows")
    print(f"\n{'fits' if need.problem is None else 'DOES NOT FIT: ' + need.problem}")
    if compared:
        print(f"\nThe same run with other tables, GiB; the smallest number of {unit}s in whole nodes")
        print(tabulate([_compared(name, row, cluster) for name, (row, _) in compared.items()], headers="keys"))


def _compared(name: str, row: dict[str, Any], cluster: ClusterConfig) -> dict[str, Any]:
    found = row["smallest"]
    few = (
        "none is enough" if found["ranks"] is None else f"{found['ranks']:,}{'' if found['checked'] else ' (estimate)'}"
    )
    shown = {"tables": name, "all tables": _gib(row["table_bytes"]), "maps a rank": _gib(row["maps_per_rank"])}
    if cluster.device == "cuda":
        shown["GPU, a rank"] = _gib(row["peak_per_rank"])
    shown["host, a rank"] = _gib(row["host_peak_per_rank"])
    return shown | {f"on {cluster.world:,}": "fits" if row["fits"] else "does not fit", "smallest": few}


def _layout_rows(model: MetaTowers, need: Need) -> list[dict[str, Any]]:
    if need.layout is None:
        return []
    tables = {table.table: table for table in tables_of(model)}
    found = []
    for module in need.layout.plan.values():
        for name, how in module.items():
            table = tables[name]
            ranks = sorted({shard.placement.rank() for shard in how.sharding_spec.shards})
            largest = max(s.shard_sizes[0] * s.shard_sizes[1] for s in how.sharding_spec.shards)
            found.append(
                {
                    "table": name,
                    "rows": f"{table.rows:,}",
                    "width": table.width,
                    "stored": table.storage or "fp32, trained",
                    "GiB": _gib(table.nbytes(need.cluster.device == "cuda")),
                    "sharding": how.sharding_type,
                    "ranks": f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]}-{ranks[-1]}",
                    "largest shard": f"{100 * largest / (table.rows * table.width):.3g} %",
                }
            )
    return found


def _gib(size: float) -> str:
    return f"{size / GIB:,.2f}" if size < 100 * GIB else f"{size / GIB:,.0f}"


def _write(path: Path, result: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    part.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    os.replace(part, path)
