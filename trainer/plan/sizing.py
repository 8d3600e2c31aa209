"""Whether a run fits on a cluster, and the smallest cluster that it fits on."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torchrec.distributed.planner import Topology
from torchrec.distributed.planner.types import PlannerError
from torchrec.distributed.types import ShardingPlan

from recpress.trainer.model.sharding import RESERVED, planner, sharders
from recpress.trainer.plan.config import ClusterConfig
from recpress.trainer.plan.job import Job
from recpress.trainer.plan.label_job import LabelJob
from recpress.trainer.plan.memory import GIB, Line, Place, gib, label_lines, peak, rank_lines
from recpress.trainer.plan.meta_labelled import MetaLabelled
from recpress.trainer.plan.meta_model import MetaTowers, Shard, even_shards, shards_by_rank

PlannedModel = MetaTowers | MetaLabelled
MOST_RANKS = 1 << 14
"""Limit of the search for the smallest cluster."""
CHECKED_RANKS = 1 << 9
"""Up to so many ranks TorchRec's planner confirms the result; its time grows with the number of ranks."""


@dataclass(frozen=True)
class Need:
    """What a run needs of a cluster."""

    cluster: ClusterConfig
    lines: list[Line]
    """Of the rank that needs the most memory."""
    layout: ShardingPlan | None
    """TorchRec's; None if its planner found none."""
    problem: str | None
    """Why it does not fit."""

    @property
    def place(self) -> Place:
        """Memory of the tables."""
        return table_memory(self.cluster)

    def rank_bytes(self, place: Place) -> int:
        """Peak of the rank that needs the most memory."""
        return peak(self.lines, place)


def table_memory(cluster: ClusterConfig) -> Place:
    return "device" if cluster.device == "cuda" else "host"


@dataclass(frozen=True)
class Smallest:
    """The smallest cluster of such nodes that a run fits on."""

    ranks: int | None
    """None: no number of ranks is sufficient."""
    checked: bool
    """Whether TorchRec's planner found a plan for it."""
    why: str = ""


def assess(job: Job | LabelJob, model: PlannedModel, cluster: ClusterConfig, activations: int) -> Need:
    """Plan by TorchRec's planner, and add up the memory of the rank that needs the most."""
    layout, problem = _layout(job, model, cluster)
    if layout is None:
        lines = _rank_lines(job, model, even_shards(model, cluster.world), cluster, activations)
        return Need(cluster, lines, None, problem)
    candidates: dict[tuple[Shard, ...], list[Line]] = {}
    for shards in shards_by_rank(model, layout, cluster.world):
        key = tuple(sorted(shards, key=lambda s: (s.table, s.rows, s.width)))
        if key not in candidates:
            candidates[key] = _rank_lines(job, model, shards, cluster, activations)
    lines = max(candidates.values(), key=lambda found: peak(found, table_memory(cluster)))
    return Need(cluster, lines, layout, _shortage(lines, cluster))


def _rank_lines(
    job: Job | LabelJob, model: PlannedModel, shards: list[Shard], cluster: ClusterConfig, activations: int
) -> list[Line]:
    context, cuda = int(cluster.context_gib * GIB), cluster.device == "cuda"
    if isinstance(job, LabelJob):
        assert isinstance(model, MetaLabelled)
        return label_lines(job, model, shards, world=cluster.world, cuda=cuda, context=context)
    assert isinstance(model, MetaTowers)
    return rank_lines(job, model, shards, world=cluster.world, cuda=cuda, context=context, activations=activations)


def _shortage(lines: list[Line], cluster: ClusterConfig) -> str | None:
    """Why a rank with these parts does not fit; None if it fits."""
    host = peak(lines, "host") * cluster.ranks_per_node
    if cluster.device == "cuda" and peak(lines, "device") > cluster.memory_gib * GIB:
        return f"a rank needs {gib(peak(lines, 'device'))} GiB of its GPU's {cluster.memory_gib:g}"
    if host > cluster.host_memory_gib * GIB:
        each = f"{cluster.ranks_per_node} ranks x {gib(peak(lines, 'host'))} GiB"
        return f"a node needs {gib(host)} GiB ({each}) of its {cluster.host_memory_gib:g}"
    return None


def _capacity(cluster: ClusterConfig) -> float:
    """Bytes of memory for the tables of a rank."""
    if cluster.device == "cuda":
        return cluster.memory_gib * GIB
    return cluster.host_memory_gib * GIB / cluster.ranks_per_node


def _layout(job: Job | LabelJob, model: PlannedModel, cluster: ClusterConfig) -> tuple[ShardingPlan | None, str | None]:
    speeds = {"intra_host_bw": cluster.intra_gb_s * 1e6, "inter_host_bw": cluster.inter_gb_s * 1e6}  # bytes a ms
    caps = {"ddr_cap": int(cluster.host_memory_gib * GIB / cluster.ranks_per_node)}
    if cluster.device == "cuda":
        caps["hbm_cap"] = int(cluster.memory_gib * GIB)
    ranks = Topology(cluster.world, cluster.device, local_world_size=cluster.ranks_per_node, **caps, **speeds)
    try:
        chosen = planner(model, ranks, batch_size=job.batch_size, sharding_types=job.sharding_types)
        optimizer = (job.config if isinstance(job, LabelJob) else job.network).optimizer.tables
        return chosen.plan(model, sharders(optimizer=optimizer, device_type=cluster.device)), None
    except PlannerError:
        cap = gib(_capacity(cluster))
        need = gib(sum(s.nbytes(cluster.device == "cuda") for s in even_shards(model, cluster.world)))
        share = f"{100 * (1 - RESERVED):.0f} %"
        return (
            None,
            f"TorchRec's planner finds no plan: tables of {need} GiB per rank, expected at most {share} of {cap}",
        )


def smallest(job: Job | LabelJob, model: PlannedModel, cluster: ClusterConfig, activations: int) -> Smallest:
    """The fewest ranks: any number on one node, then whole nodes. By bisection with evenly cut tables; at the end
    TorchRec's planner confirms the result, or that of up to three more steps."""
    node = cluster.ranks_per_node

    def shape(step: int) -> ClusterConfig:
        """The step-th size: 1, 2, ... ranks of one node, then 2, 3, ... nodes."""
        if cluster.device == "cpu":  # memory belongs to the node: ranks are not added one by one
            return replace(cluster, nodes=step)
        if step <= node:
            return replace(cluster, nodes=1, ranks_per_node=step)
        return replace(cluster, nodes=step - node + 1)

    def shortage(step: int) -> str | None:
        at = shape(step)
        shards = even_shards(model, at.world)
        stored = sum(s.nbytes(at.device == "cuda") for s in shards)
        if stored > (1 - RESERVED) * _capacity(at):
            return "tables"
        return _shortage(_rank_lines(job, model, shards, at, activations), at)

    last = max(node, MOST_RANKS // node)
    # Looked-up vectors grow with the number of ranks, so that more ranks can be too many: double up to the first fit.
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
