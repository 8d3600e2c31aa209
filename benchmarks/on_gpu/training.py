"""A training step with each kind of tables: rows/s of our loop and of a bare one, and peak memory."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from recpress.benchmarks.loops import BARE, OURS, Case, Subject, random_batch
from recpress.benchmarks.on_gpu.device import kernels, synchronize
from recpress.data.config import NegativesConfig, StreamConfig
from recpress.data.stream.batch import Batch
from recpress.modules.config import LossConfig, TablesConfig, TowersConfig, TwoTowerConfig
from recpress.modules.row_source import round_up
from recpress.trainer.plan.config import ClusterConfig, PlanConfig
from recpress.trainer.plan.job import job_of
from recpress.trainer.plan.memory import peaks
from recpress.trainer.plan.meta_model import MetaTowers, activation_bytes
from recpress.trainer.plan.sizing import assess

TABLES = ("trained", "frozen int8", "frozen fp32", "hashed", "hashed, frozen int8", "hashed, frozen fp32")


def case_of(tables: str, tiny: bool, table_rows: int = 4_500_000, dim: int = 128) -> Case:
    """The model of one kind of tables; hashed ones have a fifth of the rows."""
    table_rows, dim, batch, negatives = (600, 16, 32, 2) if tiny else (table_rows, dim, 8192, 4)
    share = 0.2 if tables.startswith("hashed") else 1.0
    return Case(
        tables=tables, loop=OURS, table_rows=table_rows, dim=dim, batch=batch, ranks=1, share=share, negatives=negatives
    )  # fmt: skip


def subject_of(case: Case, tiny: bool, device: torch.device) -> Subject:
    return Subject(case, (16,) if tiny else (256,), device)


def timed(loop: Callable[[Any], None], batches: Any, device: torch.device) -> float:
    synchronize(device)
    start = time.perf_counter()
    loop(batches)
    synchronize(device)
    return time.perf_counter() - start


def rows(device: torch.device, tiny: bool) -> Iterator[dict[str, Any]]:
    """`peak MB` and `tables MB` are of the device: all that a run holds, and the tables as they are stored. `plan MB`
    is what `recpress plan` predicts for the peak, without the CUDA context."""
    steps, runs = (3, 1) if tiny else (50, 5)
    batches = [random_batch(case_of("trained", tiny), seed, device) for seed in range(steps)]
    held = sum(_bytes(batch) for batch in batches)
    trained = 0.0
    for tables in TABLES:
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
        case = case_of(tables, tiny)
        subject = subject_of(case, tiny, device)
        seconds: dict[str, list[float]] = {OURS: [], BARE: []}
        for run in range(runs + 1):  # the first one warms up
            for loop, found in seconds.items():
                took = timed(partial(subject.train, loop=loop), batches, device)
                if run:
                    found.append(took)
        speed = case.batch * steps / statistics.median(seconds[OURS])
        trained = trained or speed
        yield {
            "tables": tables,
            "rows/s, our loop": speed,
            "rows/s, bare loop": case.batch * steps / statistics.median(seconds[BARE]),
            "ours / bare": statistics.median(b / a for a, b in zip(seconds[OURS], seconds[BARE], strict=True)),
            "x trained": speed / trained,
            "tables MB": sum(subject.model.module.table_bytes.values()) / 1e6,
            "peak MB": (torch.cuda.max_memory_allocated(device) - held) / 1e6 if device.type == "cuda" else None,
            "plan MB": planned_bytes(case, tiny, device) / 1e6,
        }
        subject.close()


def planned_bytes(case: Case, tiny: bool, device: torch.device) -> int:
    """Peak of the device's memory, or on a CPU of the host's, by `recpress plan`, without context and checkpoints."""
    config = PlanConfig(
        users=case.users,
        items=case.items,
        dim=case.dim,
        model=TwoTowerConfig(
            tables=TablesConfig(
                strategy="frozen" if case.frozen else "random", dim=round_up(case.dim), storage=case.storage
            ),
            towers=TowersConfig(kind="residual", hidden=(16,) if tiny else (256,)),
            loss=LossConfig(kind="bce"),
        ),
        negatives=NegativesConfig(kind="uniform", count=case.negatives, shared=False),
        stream=StreamConfig(batch_size=case.batch),
        cluster=ClusterConfig(nodes=1, ranks_per_node=1, device=device.type, context_gib=0.0),  # type: ignore[arg-type]
    )
    job = job_of(config)
    if case.hashed:
        job = job.with_tables(job.network.model, job.dim, case.share, 1)
    model = MetaTowers(job)
    need = assess(job, model, config.cluster, activation_bytes(job, model))
    return peaks(need.lines, need.place)["train"]


def _bytes(batch: Batch) -> int:
    tensors = [batch.label, batch.log_q]
    for features in (batch.user_features, batch.item_features):
        tensors += [features.values(), features.lengths(), features.offsets()]
    return sum(tensor.nbytes for tensor in tensors)


def repeated(device: torch.device, tiny: bool) -> Iterator[dict[str, Any]]:
    """Whether the same seed gives the same bits: twice in our loop, whose pipeline works ahead, and in the bare one."""
    steps = 3 if tiny else 20
    for tables in TABLES[:2]:
        case = case_of(tables, tiny, table_rows=1_200_000)
        batches = [random_batch(case, seed, device) for seed in range(steps)]
        weights = []
        for loop in (OURS, OURS, BARE):
            subject = subject_of(case, tiny, device)
            subject.train(batches, loop=loop)
            weights.append({name: _whole(value).cpu() for name, value in subject.model.state_dict().items()})
            subject.close()
        for name, one, other in (("our loop twice", 0, 1), ("our loop and the bare one", 0, 2)):
            pairs = [(weights[one][key], weights[other][key]) for key in weights[0]]
            yield {
                "tables": tables,
                "steps": steps,
                "compared": name,
                "same bits": all(torch.equal(a, b) for a, b in pairs),
                "largest difference": max(
                    (float((a.double() - b.double()).abs().nan_to_num().max()) for a, b in pairs if a.numel()),
                    default=0.0,
                ),
            }


def _whole(value: Any) -> torch.Tensor:
    """A tensor, also of a table that one rank has all of."""
    return torch.cat([s.tensor for s in value.local_shards()]) if hasattr(value, "local_shards") else value.detach()


def profiled(device: torch.device, tiny: bool) -> Iterator[dict[str, Any]]:
    steps = 3 if tiny else 20
    for tables in TABLES[:3]:
        case = case_of(tables, tiny, table_rows=1_200_000)
        batches = [random_batch(case, seed, device) for seed in range(steps)]
        subject = subject_of(case, tiny, device)
        yield from kernels(partial(subject.train, batches, loop=BARE), device, f"{steps} steps, {tables}")
        subject.close()
