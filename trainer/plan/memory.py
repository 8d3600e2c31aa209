"""Memory of one rank of `recpress train`, part by part, each by a formula.

It counts memory that the kernel cannot reclaim: on a CPU rank anonymous memory. Libraries and factors that are mapped
from files are page cache, and not counted. The peak is the largest of four moments with different parts: `setup` (pairs
of the log are collected), `load` (tables are filled), `train` (during a step), `checkpoint` (from the first checkpoint
on, whose copy of the state stays for the next one).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from recpress.data.config import StreamConfig
from recpress.data.negatives.interaction_set import AT_ONCE
from recpress.data.stream.memory import KEPT
from recpress.modules.row_source import BLOCK_BYTES
from recpress.trainer.config import TableOptimizer
from recpress.trainer.model.table_optimizers import TABLE_OPTIMIZERS
from recpress.trainer.plan.job import Job, MapShape
from recpress.trainer.plan.label_job import LabelJob
from recpress.trainer.plan.meta_labelled import MetaLabelled
from recpress.trainer.plan.meta_model import MetaTowers, Shard

MIB, GIB = 1 << 20, 1 << 30
PROCESS = 262 * MIB
"""Anonymous memory of a process after `import recpress.trainer.train.stage`; torch 2.13 + torchrec 1.8, CPU."""
METRICS = 31 * MIB
"""Of `torchmetrics`, which is imported when the tables are loaded."""
ALLOCATOR = 32 * MIB
"""Freed memory that glibc retains between steps: the largest block that it takes from the heap."""
UPLOAD = 224 * MIB
"""Of `object_store.upload_file`: 211 and 221 MiB for files of 256 and 512 MiB (measured, pyarrow 26)."""
MARKS = "marking positives"
STEP = ("activations", "looked-up vectors", "batches", MARKS)
"""Parts that each step frees and allocates again. glibc before 2.38 leaves holes between aligned blocks of changing
sizes, and `RetainFreedMemory` makes it retain them: a factor of 1.9 to 2.4 in all, for batches of 2,048 to 16,384
(measured)."""
PIPELINE = 3
"""Batches in TrainPipelineSparseDist: in the step, in the exchange of ids, on the way to the device."""
Place = Literal["device", "host"]
Phase = Literal["always", "run", "setup", "load", "train", "checkpoint"]
PHASES: dict[str, tuple[Phase, ...]] = {
    "setup": ("always", "setup"),
    "load": ("always", "run", "load"),
    "train": ("always", "run", "train"),
    "checkpoint": ("always", "run", "train", "checkpoint"),
}
"""Moment -> phases of the parts that exist then; `run` is from the creation of the tables on."""


@dataclass(frozen=True)
class Line:
    """One part of a rank's memory."""

    name: str
    bytes: int
    formula: str
    place: Place
    phase: Phase = "run"


def rank_lines(
    job: Job, model: MetaTowers, shards: list[Shard], *, world: int, cuda: bool, context: int, activations: int
) -> list[Line]:
    """All parts, except empty ones, of the memory of a rank with these shards.

    Args:
        context: bytes of the device that CUDA and its libraries take.
        activations: `activation_bytes`, which does not depend on the ranks.
    """
    device: Place = "device" if cuda else "host"
    lines = [
        *_state_lines(
            shards,
            dense=sum(p.numel() for p in model.dense()),
            maps=job.maps,
            log_counts=sum(m.num_ids for m in job.maps) if model.counted else 0,
            features=job.user.feature_bytes + job.item.feature_bytes,
            optimizer=job.network.optimizer.tables,
            keep_best=job.keep_best,
            averages=job.averages,
            uploads=job.uploads,
            metrics=job.metrics,
            cuda=cuda,
            context=context,
        ),
        *_negatives_lines(job, device),
        *_step_lines(job, model, shards, world, device, activations),
        *_stream_lines(
            job.network.stream,
            8 * 2 + (4 if job.network.use_label else 0),
            rows=job.rows,
            sampled=job.sampled,
            group_rows=job.group_rows,
            world=world,
        ),
    ]
    return _with_retained(lines, cuda) + [line for line in _load_lines(job, model, shards, cuda) if line.bytes]


def label_lines(
    job: LabelJob, model: MetaLabelled, shards: list[Shard], *, world: int, cuda: bool, context: int
) -> list[Line]:
    """`rank_lines` of a model of labels."""
    device: Place = "device" if cuda else "host"
    batch, copies = job.batch_size, 1 if world == 1 else 2

    def vectors(of: Iterable[Shard]) -> int:
        return 4 * batch * sum(s.width * s.lookups for s in of)

    looked_up = world * copies * (vectors(shards) + vectors(s for s in shards if s.storage is None))
    looked_up += vectors(model.table_shards())
    one = batch * (8 * (job.values + 2 * len(job.features.keys)) + 4 * (len(job.features.floats) + 1))
    exchange = (
        f"ranks x batch x widths of the shards x 4 B x {copies}, trained twice; + vectors that this rank receives"
    )
    frozen = [s for s in shards if s.storage is not None]
    largest = max((4 * s.rows * s.width for s in frozen), default=0)
    averaged = [model.maps[s.table] for s in frozen if s.table in model.maps]
    entries = sum(one.num_ids * one.rows_per_id for one in averaged)
    lines = [
        *_state_lines(
            shards,
            dense=sum(p.numel() for p in model.dense()),
            maps=list(model.maps.values()),
            log_counts=0,
            features=job.feature_bytes,
            optimizer=job.config.optimizer.tables,
            keep_best=job.keep_best,
            averages=job.config.ema is not None,
            uploads=job.uploads,
            metrics=job.metrics,
            cuda=cuda,
            context=context,
        ),
        Line("activations", model.activations, "forward and backward of the dense part, measured", device, "train"),
        Line("looked-up vectors", looked_up, exchange, device, "train"),
        Line("batches", round(PIPELINE * one), f"{PIPELINE} x (ids, lengths, offsets, floats)", device, "train"),
        Line("validation rows", job.validation_bytes // world, "rows / ranks x B per row", "host", "train"),
        *_stream_lines(
            job.config.stream,
            job.row_bytes,
            rows=job.rows,
            sampled=job.sampled,
            group_rows=job.group_rows,
            world=world,
        ),
        Line("loading tables", 4 * min(BLOCK_BYTES, largest), "4 blocks of 32 MiB", "host", "load"),
        Line("shared rows computed", 8 * entries, "frozen tables: 8 B per entry of the map", "host", "load"),
    ]
    return _with_retained(lines, cuda)


def _with_retained(lines: list[Line], cuda: bool) -> list[Line]:
    """The lines that are not empty, with what malloc retains."""
    if not cuda:
        step = sum(line.bytes for line in lines if line.name in STEP)
        formula = f"as much again as {', '.join(STEP)}: glibc (measured)"
        lines = [*lines, Line("retained between steps", step, formula, "host", "train")]
    lines = [
        *lines,
        Line("freed, retained by malloc", ALLOCATOR, "glibc: a block of 32 MiB (measured)", "host", "always"),
    ]
    return [line for line in lines if line.bytes]


def _state_lines(
    shards: list[Shard],
    *,
    dense: int,
    maps: Sequence[MapShape],
    log_counts: int,
    features: int,
    optimizer: TableOptimizer,
    keep_best: bool,
    averages: bool,
    uploads: bool,
    metrics: bool,
    cuda: bool,
    context: int,
) -> list[Line]:
    """The process, weights and optimizer states, and their copies.

    Args:
        dense: number of weights of the dense part.
        log_counts, features: bytes.
    """
    device: Place = "device" if cuda else "host"
    trained, kind = [s for s in shards if s.storage is None], TABLE_OPTIMIZERS[optimizer]
    trained_bytes = sum(s.nbytes(cuda) for s in trained)
    state = sum(4 * s.rows * (kind.per_row + kind.per_value * s.width) for s in trained)
    frozen_bytes = sum(s.nbytes(cuda) for s in shards if s.storage is not None)
    staged = trained_bytes + state + (3 + averages) * 4 * dense
    return [
        Line("process", PROCESS, "torch, torchrec and recpress imported (measured)", "host", "always"),
        Line("metrics", METRICS * metrics, "torchmetrics imported (measured)", "host", "train"),
        Line("CUDA context", context * cuda, "--cluster.context-gib (assumed)", "device", "always"),
        Line("trainable tables", trained_bytes, "rows x dim x 4 B", device),
        Line("optimizer state", state, f"{optimizer}: {kind.state}", device),
        Line("frozen tables", frozen_bytes, "rows x bytes of a row, with scale", device),
        Line("maps", sum(m.nbytes for m in maps), "every rank: ids x rows per id x (4 B + weight)", device),
        Line("log counts behind maps", log_counts, "every rank: ids x 1 B", device),
        Line("side features", features, "every rank: ids x 8 B per category, 4 B per float", device),
        Line("dense part", 4 * 4 * dense, "weights, gradients (DDP buckets), 2 Adam moments", device, "train"),
        Line("average of the dense part", 4 * dense * averages, "--ema: a copy of the weights", device, "train"),
        Line("best weights", (trained_bytes + 4 * dense) * keep_best, "a copy of trained weights", "host", "train"),
        Line(
            "copy for checkpoints",
            staged,
            "trainable tables, optimizer state, dense weights and 2 Adam moments",
            "host",
            "checkpoint",
        ),
        Line(
            "upload of a checkpoint",
            min(staged, UPLOAD) * uploads,
            f"at most {UPLOAD // MIB} MiB (measured) for any size",
            "host",
            "checkpoint",
        ),
    ]


def _negatives_lines(job: Job, device: Place) -> list[Line]:
    negatives, (batch, _) = job.network.negatives, job.strides
    counted = negatives.kind != "uniform"
    tables = counted + (counted or job.network.model.loss.in_batch)
    lines = [Line("item counts", tables * 12 * job.item.ids, f"{tables} x 12 B per item", device)]
    if job.rejects:
        bits = _filter_bits(job.rows)
        pairs = 8 * job.rows + (bits // 8 if device == "host" else 0)
        collecting = 16 * job.rows + max(8 * job.rows, bits + 24 * job.rows)
        marks = 2 * batch * negatives.count * negatives.shared
        lines += [
            Line("positive pairs", pairs, "every rank: 8 B per row of the log, on CPU + 1 to 2 B", device),
            Line("collecting pairs", collecting, "8 B x 5 per row + a byte per bit", "host", "setup"),
            Line(MARKS, marks, "2 x batch x negatives", device, "train"),
        ]
        if device == "device":
            drawn = batch * negatives.count
            working = 25 * min(drawn, AT_ONCE) if negatives.shared else 48 * max(drawn, min(16 * drawn, AT_ONCE))
            lines.append(Line("rejecting positives", working, "25 or 48 B per pair searched at once", device, "train"))
    return lines


def _step_lines(
    job: Job, model: MetaTowers, shards: list[Shard], world: int, device: Place, activations: int
) -> list[Line]:
    trained = [s for s in shards if s.storage is None]
    batch, items = job.strides
    strides, negatives = {"user": batch, "item": items}, job.network.negatives

    def vectors(of: list[Shard]) -> int:
        return sum(strides[s.side] * s.width for s in of) * 4

    copies = 1 if world == 1 else 2
    looked_up = world * copies * (vectors(shards) + vectors(trained)) + vectors(list(model.table_shards()))
    one = 3 * 8 * (batch + items) + 4 * (batch + items) + 4 * batch + batch * negatives.count * negatives.shared
    formula = f"ranks x batch x widths of the shards x 4 B x {copies}, trained twice; + vectors that this rank receives"
    return [
        Line("activations", activations, "towers, loss and gradients: peak of a step on meta tensors", device, "train"),
        Line("looked-up vectors", looked_up, formula, device, "train"),
        Line("batches", PIPELINE * one, f"{PIPELINE} x (ids, lengths, offsets, labels, masks)", device, "train"),
    ]


def _stream_lines(
    config: StreamConfig, row: int, *, rows: int, sampled: int, group_rows: int, world: int
) -> list[Line]:
    """`data.stream.memory` without a log: shuffle windows, in full or in part, and decoded row groups.

    Args:
        row: bytes of a row.
    """
    rate = sampled / rows if rows else 1.0
    ahead = rate * group_rows * config.interleave  # rows of all ranks that row groups add to a window
    in_windows = 3 * config.buffer_rows + 2 * ahead
    in_windows = min(in_windows, sampled or in_windows) / world
    threads, group = config.chosen_threads, group_rows * row
    decoding = round(threads * 4 * group + (2 * threads + 1) * rate * group)
    window = "(3 buffer_rows + 2 interleave x row group) / ranks x B per row"
    decoded = "(4 threads + (2 threads + 1) x rate) x row group x B per row"
    return [
        Line("stream", round(in_windows * row), window, "host", "train"),
        Line("decoding", decoding, decoded, "host", "always"),
        Line("retained in threads' heaps", KEPT, "glibc: freed by reading threads (measured)", "host", "always"),
    ]


def _load_lines(job: Job, model: MetaTowers, shards: list[Shard], cuda: bool) -> list[Line]:
    """Host memory that exists only while tables are filled."""
    loaded = [s for s in shards if job.dim is not None and (s.storage is not None or s.table in ("user", "item"))]
    largest = max((4 * s.rows * s.width for s in loaded), default=0)
    blocks = "4 blocks of 32 MiB: file, copy, this block and the last"
    lines = [Line("loading tables", 4 * min(BLOCK_BYTES, largest), blocks, "host", "load")]
    if job.maps and job.dim is not None and not job.row_vectors:
        rows = {table.table: table.rows for table in model.table_shards()}
        computed = max(
            4 * job.dim * (rows[name] * 2 if side.map.rows_per_id == 1 else side.ids * 6)
            for name, side in (("user", job.user), ("item", job.item))
            if side.map is not None
        )
        formula = "every rank: rows x dim x 4 B x 2; with two rows per id: ids x dim x 4 B x 6"
        lines.append(Line("shared rows computed", computed, formula, "host", "load"))
    if cuda:
        maps = sum(m.nbytes + m.num_ids * model.counted for m in job.maps)
        pairs = (8 * job.rows + _filter_bits(job.rows) // 8) * job.rejects
        lines += [
            Line("maps, before the copy to the GPU", maps, "as on the GPU", "host", "load"),
            Line("positive pairs, before the copy to the GPU", pairs, "9 to 10 B per row of the log", "host", "load"),
        ]
    return lines


def _filter_bits(rows: int) -> int:
    """Of `data.pairs`: the smallest power of two that is at least 8 times the keys."""
    return 1 << max(0, 8 * rows - 1).bit_length() if rows else 0


def peaks(lines: list[Line], place: Place) -> dict[str, int]:
    """Bytes at each moment."""
    return {
        moment: sum(line.bytes for line in lines if line.place == place and line.phase in phases)
        for moment, phases in PHASES.items()
    }


def peak(lines: list[Line], place: Place) -> int:
    """Bytes at the worst moment."""
    return max(peaks(lines, place).values())


def gib(size: float) -> str:
    """In GiB, with two decimals below 100."""
    return f"{size / GIB:,.2f}" if size < 100 * GIB else f"{size / GIB:,.0f}"
