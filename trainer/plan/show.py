"""Terminal output of `recpress plan`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tabulate import tabulate  # type: ignore[import-untyped]

from recpress.trainer.plan.config import ClusterConfig
from recpress.trainer.plan.memory import Place, gib, peaks
from recpress.trainer.plan.meta_model import TableModel
from recpress.trainer.plan.sizing import Need


def show(
    described: str,
    model: TableModel,
    need: Need,
    compared: dict[str, tuple[dict[str, Any], Need]],
    notes: Sequence[str],
) -> None:
    """Print the cluster, the sharding plan, the memory of a rank and the comparison with other tables, if any.

    Args:
        described: the log and the batch, in one line.
        notes: printed after the parts of the memory.
    """
    cluster = need.cluster
    unit = "GPU" if cluster.device == "cuda" else "rank"
    memory = f"{cluster.memory_gib:g} GiB each, " if cluster.device == "cuda" else ""
    print(
        f"cluster: {cluster.nodes:,} x {cluster.ranks_per_node} = {cluster.world:,} {unit}s, {memory}"
        f"{cluster.host_memory_gib:g} GiB per node\nlog: {described}"
    )
    print("\nSharding plan (TorchRec's planner)")
    if need.layout is None:
        print(need.problem)
    else:
        print(tabulate(layout_rows(model, need), headers="keys"))
    print(f"\nMemory of a rank, MiB, of the rank that needs the most{'' if need.layout else ' (tables cut evenly)'}")
    when = {
        "always": "always",
        "run": "load, train",
        "setup": "set up",
        "load": "load",
        "train": "train",
        "checkpoint": "checkpoint",
    }
    places: tuple[Place, ...] = ("device", "host")
    for place in places:
        rows = [
            (line.name, round(line.bytes / (1 << 20), 1), when[line.phase], line.formula)
            for line in need.lines
            if line.place == place
        ]
        if not rows:
            continue
        print(f"\n{'on the GPU' if place == 'device' else 'in host memory'}")
        print(tabulate(rows, headers=("part", "MiB", "when", "formula"), floatfmt=",.1f"))
        at = {moment: f"{gib(size)} GiB" for moment, size in peaks(need.lines, place).items()}
        print(
            f"peak {gib(need.rank_bytes(place))} GiB (set up {at['setup']}, load {at['load']}, train {at['train']}, "
            f"checkpoint {at['checkpoint']})"
        )
    for note in notes:
        print(f"\n{note}")
    print(f"\n{'fits' if need.problem is None else 'DOES NOT FIT: ' + need.problem}")
    if compared:
        print(f"\nThe same run with other tables, GiB; the smallest number of {unit}s in whole nodes")
        print(tabulate([_compared(name, row, cluster) for name, (row, _) in compared.items()], headers="keys"))


def _compared(name: str, row: dict[str, Any], cluster: ClusterConfig) -> dict[str, Any]:
    found = row["smallest"]
    few = "none is sufficient"
    if found["ranks"] is not None:
        few = f"{found['ranks']:,}{'' if found['checked'] else ' (estimate)'}"
    shown = {"tables": name, "all tables": gib(row["table_bytes"]), "maps per rank": gib(row["maps_per_rank"])}
    if cluster.device == "cuda":
        shown["GPU, per rank"] = gib(row["peak_per_rank"])
    shown["host, per rank"] = gib(row["host_peak_per_rank"])
    return shown | {f"on {cluster.world:,}": "fits" if row["fits"] else "does not fit", "smallest": few}


def layout_rows(model: TableModel, need: Need) -> list[dict[str, Any]]:
    """A row per table of the plan, by printed column."""
    if need.layout is None:
        return []
    tables = {table.table: table for table in model.table_shards()}
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
                    "GiB": gib(table.nbytes(need.cluster.device == "cuda")),
                    "sharding": how.sharding_type,
                    "ranks": f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]}-{ranks[-1]}",
                    "largest shard": f"{100 * largest / (table.rows * table.width):.3g} %",
                }
            )
    return found
