"""Memory of a rank of `recpress train`, part by part, each by a formula: what `recpress plan` prints.

Counted is memory that the kernel cannot take back: on a CPU rank anonymous memory. Libraries and factors that are
mapped from files are page cache, and not counted. The peak is the largest of four moments, in which different parts
live: `setup` (pairs of the log are collected), `load` (tables are filled), `train` (a step is under way), `checkpoint`
(so from the first checkpoint on: its copy of the state stays for the next one).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from recpress.data.stream.memory import KEPT
from recpress.modules.row_source import BLOCK_BYTES
from recpress.trainer.plan.job import Job
from recpress.trainer.plan.shards import MetaTowers, Shard, tables_of

MIB, GIB = 1 << 20, 1 << 30
PROCESS = 262 * MIB
"""Anonymous memory of a process after `import recpress.trainer.train.stage`; torch 2.13 + torchrec 1.8, CPU."""
METRICS = 31 * MIB
"""What `torchmetrics` adds, which is imported when the tables are loaded."""
ALLOCATOR = 32 * MIB
"""What glibc keeps of freed memory where no step is under way: the largest block that it takes from the heap."""
MARKS = "marking positives"
STEP = ("activations", "looked-up vectors", "batches", MARKS)
"""Parts that each step frees and takes again. glibc before 2.38 leaves holes between aligned blocks of changing sizes,
and `RetainFreedMemory` lets it keep them: a factor of 1.9 to 2.4 in all, of batches of 2,048 to 16,384 (measured)."""
UPLOAD = 224 * MIB
"""What `data.storage.upload_file` holds: 211 and 221 MiB of files of 256 and 512 MiB (measured, pyarrow 26)."""
PIPELINE = 3
"""Batches that TrainPipelineSparseDist holds: in the step, in the exchange of ids, on the way to the device."""
Place = Literal["device", "host"]
Phase = Literal["always", "run", "setup", "load", "train", "checkpoint"]
"""When a part is there: at one of the four moments (`train`: at `checkpoint` too), at all of them, or (`run`) from the
tables' making on."""


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
    """All parts of the memory of one rank that holds `shards`.

    Args:
        context: bytes that CUDA and its libraries take of the device.
        activations: `activation_bytes`, which does not depend on the ranks.
    """
    device: Place = "device" if cuda else "host"
    negatives = job.network.negatives
    batch, items = job.strides
    strides = {"user": batch, "item": items}
    trained = [s for s in shards if s.storage is None]
    frozen = [s for s in shards if s.storage is not None]
    trained_bytes, state = sum(s.nbytes(cuda) for s in trained), sum(4 * s.rows for s in trained)
    frozen_bytes = sum(s.nbytes(cuda) for s in frozen)
    lines = [Line("process", PROCESS, "torch, torchrec and recpress imported (measured)", "host", "always")]
    if job.metrics:
        lines.append(Line("metrics", METRICS, "torchmetrics imported (measured)", "host", "train"))
    if cuda:
        lines.append(Line("CUDA context", context, "--cluster.context-gib (assumed)", "device", "always"))
    if trained:
        lines.append(Line("trainable tables", trained_bytes, "rows x dim x 4 B", device))
        lines.append(Line("optimizer state", state, "row-wise Adagrad: 4 B a row", device))
    if frozen:
        lines.append(Line("frozen tables", frozen_bytes, "rows x bytes of a row, scale included", device))
    sides = (job.user, job.item)
    maps = [side.map for side in sides if side.map is not None]
    if maps:
        size = sum(m.nbytes for m in maps)
        lines.append(Line("maps", size, "every rank: ids x rows per id x (4 B + weight)", device))
        if model.counted:
            codes = sum(m.num_ids for m in maps)
            lines.append(Line("log counts behind maps", codes, "every rank: ids x 1 B", device))
    features = sum(side.feature_bytes for side in sides)
    if features:
        lines.append(Line("side features", features, "every rank: ids x 8 B a category, 4 B a float", device))
    dense = sum(4 * p.numel() for p in model.dense())
    lines.append(Line("dense part", 4 * dense, "weights, gradients (DDP buckets), 2 Adam moments", device, "train"))
    if job.keep_best:
        copied = trained_bytes + dense
        lines.append(Line("best weights", copied, "a copy of what is trained", "host", "train"))
    staged = trained_bytes + state + 3 * dense
    formula = "trainable tables, optimizer state, dense weights and 2 Adam moments"
    lines.append(Line("copy for checkpoints", staged, formula, "host", "checkpoint"))
    if job.uploads:
        formula = f"at most {UPLOAD // MIB} MiB (measured), whatever its size"
        lines.append(Line("upload of a checkpoint", min(staged, UPLOAD), formula, "host", "checkpoint"))
    lines += _negatives_lines(job, device)
    wide = sum(strides[s.side] * s.width for s in shards) * 4 * world
    whole = sum(strides[t.side] * t.width for t in tables_of(model)) * 4
    again = sum(strides[s.side] * s.width for s in trained) * 4 * world
    copies = 1 if world == 1 else 2
    lines += [
        Line("activations", activations, "towers, loss and gradients: peak of a step on meta tensors", device, "train"),
        Line(
            "looked-up vectors",
            copies * (wide + again) + whole,
            f"ranks x batch x widths of the shards x 4 B x {copies}, trained twice; + what this rank receives",
            device,
            "train",
        ),
    ]
    ids = 8 * (batch + items)
    one = 3 * ids + 4 * (batch + items) + 4 * batch + (batch * negatives.count if negatives.shared else 0)
    lines.append(
        Line("batches", PIPELINE * one, f"{PIPELINE} x (ids, lengths, offsets, labels, masks)", device, "train")
    )
    lines += _stream_lines(job, world)
    lines.append(Line("freed, kept by malloc", ALLOCATOR, "glibc: a block of 32 MiB (measured)", "host", "always"))
    if not cuda:
        step = sum(line.bytes for line in lines if line.name in STEP)
        formula = f"as much again as {', '.join(STEP)}: glibc (measured)"
        lines.append(Line("kept between steps", step, formula, "host", "train"))
    return lines + _load_lines(job, model, shards, cuda)


def _stream_lines(job: Job, world: int) -> list[Line]:
    """`data.memory` without a log: rounds that are in memory, whole or in part, and row groups that are decoded."""
    network = job.network
    config, row = network.stream, 8 * 2 + (4 if network.use_label else 0)
    rate = job.sampled / job.rows if job.rows else 1.0
    ahead = rate * job.group_rows * config.interleave  # rows of all ranks that row groups bring beyond a round
    held = 3 * config.buffer_rows + 2 * ahead
    held = min(held, job.sampled or held) / world
    threads, group = config.chosen_threads, job.group_rows * row
    decode = threads * 4 * group + (2 * threads + 1) * rate * group
    return [
        Line(
            "stream", round(held * row), "(3 buffer_rows + 2 interleave x row group) / ranks x B a row", "host", "train"
        ),
        Line("decoding", round(decode), "(4 threads + (2 threads + 1) x rate) x row group x B a row", "host", "always"),
        Line("kept in threads' heaps", KEPT, "glibc: of what reading threads have freed (measured)", "host", "always"),
    ]


def _load_lines(job: Job, model: MetaTowers, shards: list[Shard], cuda: bool) -> list[Line]:
    """What host memory holds while tables are filled, and no longer."""
    lines = []
    maps = [side.map for side in (job.user, job.item) if side.map is not None]
    largest = max((4 * s.rows * s.width for s in shards if _is_loaded(job, s)), default=0)
    if largest:
        formula = "4 blocks of 32 MiB: file, copy, this block and the last"
        lines.append(Line("loading tables", 4 * min(BLOCK_BYTES, largest), formula, "host", "load"))
    if maps and job.dim is not None and not job.row_vectors:
        whole = {table.table: table for table in tables_of(model)}
        sides = [("user", job.user), ("item", job.item)]
        found = []
        for name, side in sides:
            if side.map is not None:
                rows = whole[name].rows * 2 if side.map.rows_per_id == 1 else side.ids * 6
                found.append(4 * rows * job.dim)
        formula = "every rank: rows x dim x 4 B x 2; of two rows an id: ids x dim x 4 B x 6"
        lines.append(Line("shared rows worked out", max(found), formula, "host", "load"))
    if cuda:
        on_the_way = sum(m.nbytes + m.num_ids * model.counted for m in maps)
        if on_the_way:
            lines.append(Line("maps, before they move", on_the_way, "as on the GPU", "host", "load"))
        if job.rejects and job.rows:
            size = 8 * job.rows + _filter_bits(job.rows) // 8
            lines.append(Line("positive pairs, before they move", size, "9 to 10 B a row of the log", "host", "load"))
    return lines


def _filter_bits(rows: int) -> int:
    """Of `data.pairs`: the power of two from 8 times the keys on."""
    return 1 << max(0, 8 * rows - 1).bit_length() if rows else 0


def _is_loaded(job: Job, shard: Shard) -> bool:
    return job.dim is not None and (shard.storage is not None or shard.table in ("user", "item"))


def _negatives_lines(job: Job, device: Place) -> list[Line]:
    negatives, lines = job.network.negatives, []
    batch, _ = job.strides
    tables = (negatives.kind != "uniform") + (negatives.kind != "uniform" or job.network.model.loss.in_batch)
    if tables:
        lines.append(Line("item counts", tables * 12 * job.item.ids, f"{tables} x 12 B an item", device))
    if not job.rejects:
        return lines
    filter_bits = _filter_bits(job.rows)
    bits = filter_bits // 8 if device == "host" else 0
    lines.append(
        Line("positive pairs", 8 * job.rows + bits, "every rank: 8 B a row of the log, on CPU + 1 to 2 B", device)
    )
    collect = 16 * job.rows + max(8 * job.rows, filter_bits + 24 * job.rows)
    lines.append(Line("collecting pairs", collect, "8 B x 5 a row + a byte a bit", "host", "setup"))
    if negatives.shared:
        mask = 2 * batch * negatives.count
        lines.append(Line(MARKS, mask, "2 x batch x negatives", device, "train"))
    return lines


def peaks(lines: list[Line], place: Place) -> dict[str, int]:
    """Bytes at each moment."""
    live: dict[str, tuple[Phase, ...]] = {
        "setup": ("always", "setup"),
        "load": ("always", "run", "load"),
        "train": ("always", "run", "train"),
        "checkpoint": ("always", "run", "train", "checkpoint"),
    }
    return {
        moment: sum(line.bytes for line in lines if line.place == place and line.phase in phases)
        for moment, phases in live.items()
    }


def peak(lines: list[Line], place: Place) -> int:
    """Bytes at the worst moment."""
    return max(peaks(lines, place).values())


def gib(size: float) -> str:
    """In GiB, with two digits behind the point below 100."""
    return f"{size / GIB:,.2f}" if size < 100 * GIB else f"{size / GIB:,.0f}"
