"""A log as a stream of shuffled, sampled batches: each rank's share, in an order that is a pure function.

`order` defines the examples of a step; `read_plan` reads them. The number of steps is known without reading any data,
and a resumed run starts at a step: nothing before it is replayed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch.utils.data import IterableDataset, get_worker_info

from recpress.data.config import SampleConfig, Schema, StreamConfig
from recpress.data.dataset.parquet_split import ParquetSplit
from recpress.data.dataset.side_table import JaggedColumn
from recpress.data.errors import InputError
from recpress.data.sampling.corrupt_groups import ReplacingSplit
from recpress.data.sampling.selection import HoldOut, Selection
from recpress.data.stream.memory import memory_bound
from recpress.data.stream.order import EpochOrder
from recpress.data.stream.prefetch import in_background
from recpress.data.stream.read_plan import ReadAhead, ReadPlan
from recpress.data.stream.shuffle_window import BufferPool, ShuffleWindow, Table
from recpress.data.stream.stats import Meter, StreamStats

Made = TypeVar("Made")


@dataclass
class Interactions:
    """B rows of a log in host memory. A column that was not read is None, or missing in `categorical`."""

    user: torch.Tensor | None  # (B,) int64
    item: torch.Tensor | None  # (B,) int64
    label: torch.Tensor | None  # (B,) float32
    time: torch.Tensor | None  # (B,) int64, or float64 where the log has floats
    categorical: dict[str, torch.Tensor | JaggedColumn]  # (B,) int64 each, or lists
    floats: torch.Tensor | None  # (B, F) float32, in the order of the schema; NaN if the log has none
    epoch: int
    step: int
    position: int
    """Position of the first row in the epoch's order over all ranks; the others follow it. It depends on the global
    batch, not on the world size (except in the last, smaller step)."""
    size: int
    """B."""
    tables: list[Table] = field(default_factory=list, repr=False)
    """The dense columns again, all columns of one type as one tensor (columns, B)."""


class InteractionStream:
    """Batches of one rank: `for batch in InteractionStream(log.train, log.schema, StreamConfig())`.

    Each iteration begins at `start_step` of `epoch`; `set_epoch` moves to another epoch. All ranks get the same number
    of steps and, in each step, the same number of rows. Threads replace DataLoader workers: processes reach a tenth of
    the speed, since tensors travel between them. `StreamDataset` wraps a stream for a DataLoader; in a worker, an
    iteration gives the worker's share of the steps.

    A stream can be pickled, without its buffers, statistics and caches.

    Args:
        rows: a split of a log, such as `Log.train`.
        schema: what its columns mean.
        sample: only the rows of this sample; with `complement` only the rows that are not in it.
        hold_out: rows of these to exclude, for validation.
        global_batch: rows of a step on all ranks together, instead of `config.batch_size` on each: a run that resumes
            with another world size passes the same number and gets the same steps.
        epoch, start_step: position to begin at; a checkpoint stores these two integers.
        columns: names of the columns to read; by default those of the schema that the rows have, but no time.
        worker, workers: only each `workers`-th step, from `start_step + worker` on.
        pin_memory: dense columns in page-locked memory, from which CUDA copies during the computation.

    Raises:
        InputError: a sample rate outside (0, 1], a batch size that is not positive, a global batch that the ranks
            cannot share evenly, fewer rows than ranks, an unknown column; while iterating, what is wrong in the data
            (file, row group, column, row named).
    """

    def __init__(
        self,
        rows: ParquetSplit,
        schema: Schema,
        config: StreamConfig,
        *,
        sample: SampleConfig | None = None,
        complement: bool = False,
        hold_out: HoldOut | None = None,
        rank: int = 0,
        world: int = 1,
        global_batch: int | None = None,
        epoch: int = 0,
        start_step: int = 0,
        columns: Sequence[str] | None = None,
        worker: int = 0,
        workers: int = 1,
        pin_memory: bool = False,
    ) -> None:
        assert 0 <= rank < world
        assert 0 <= worker < workers
        least = {"batch_size": 1, "buffer_rows": 1, "interleave": 1, "num_threads": 0, "prefetch_batches": 0}
        for name, low in least.items():
            if getattr(config, name) < low:
                raise InputError(f"stream.{name} is {getattr(config, name)}; expected at least {low}")
        self.rows, self.schema, self.config = rows, schema, config
        self.sample, self.complement, self.hold_out = sample, complement, hold_out
        self.rank, self.world = rank, world
        self.global_batch = config.batch_size * world if global_batch is None else global_batch
        if self.global_batch < world or self.global_batch % world:
            raise InputError(
                f"a step of {self.global_batch} rows; expected a number of ranks that divides it, not {world}"
            )
        self.worker, self.workers = worker, workers
        named = (schema.user, schema.item, schema.label, *schema.categorical, *schema.floats)
        self.columns = [name for name in named if name in rows.columns] if columns is None else list(columns)
        for name in self.columns:
            if name not in rows.columns:
                raise InputError(f"{rows.files[0].path}: no column '{name}'; expected {', '.join(rows.columns)}")
        self.selection = Selection(rows, sample, complement, hold_out)
        if config.on_bad_file == "skip":
            self.rows = ReplacingSplit.of(rows, selection=self.selection, seed=config.seed)
        if self.num_rows < world:
            part = "" if sample is None else f" in {'what is not in ' if complement else ''}{sample}"
            raise InputError(f"{rows.files[0].path}: {self.num_rows} rows{part}; expected at least {world}, one a rank")
        self.pin_memory, self._is_share = pin_memory, False
        self._meter, self._pool = Meter(), BufferPool(pin_memory)
        self.set_epoch(epoch, start_step)

    def __getstate__(self) -> dict[str, Any]:
        local = ("_meter", "_pool", "order")  # locks, memory, and caches of the epoch
        return {name: value for name, value in vars(self).items() if name not in local}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        iterated: bool = state["_iterated_by_worker"]
        self._meter, self._pool = Meter(), BufferPool(self.pin_memory)
        self.set_epoch(self.epoch, self.start_step)
        self._iterated_by_worker = iterated

    def stats(self) -> StreamStats:
        """Rows and bytes per second and shares of time, since the last call or the start. Safe to call from any
        thread."""
        return self._meter.stats(self.config.chosen_threads)

    def memory_bound(self) -> int:
        """Upper bound in bytes of the host memory of an iteration, by the formula in docs/how/stream.md.

        Reads nothing. Assumes the log's mean length of lists.
        """
        return memory_bound(
            self.rows,
            self.columns,
            ReadPlan(self.order, self.rank, self.world, self.start_step),
            rank_rows=-(-self.order.window_rows // self.world),
            batch_rows=-(-self.global_batch // self.world),
            threads=self.config.chosen_threads,
            prefetch_batches=self.config.prefetch_batches,
        )

    @property
    def num_rows(self) -> int:
        """Rows of the sample on all ranks."""
        return self.selection.num_rows

    @property
    def steps_per_epoch(self) -> int:
        return self.order.num_steps(self.world)

    def set_epoch(self, epoch: int, start_step: int = 0) -> None:
        """The next iteration begins at this step of this epoch."""
        config = self.config
        self.order = EpochOrder(
            self.selection.counts,
            self.global_batch,
            config.seed,
            epoch,
            config.shuffle,
            config.buffer_rows,
            config.interleave,
        )
        if not 0 <= start_step <= self.steps_per_epoch:
            raise InputError(f"step {start_step} of epoch {epoch}: the epoch has {self.steps_per_epoch} steps")
        self.epoch, self.start_step = epoch, start_step
        self.next_step = start_step  # follows the batches of a ResumableDataset
        self._iterated_by_worker = False

    def __len__(self) -> int:
        """Batches of the next iteration, known without reading."""
        return len(self._steps())

    def _steps(self) -> range:
        return range(self.start_step + self.worker, self.steps_per_epoch, self.workers)

    def __iter__(self) -> Iterator[Interactions]:
        return self._iterate("wait")

    def _of_worker(self, worker: int, workers: int) -> InteractionStream:
        """This stream in a worker process of a DataLoader, which has a share of the steps.

        Raises:
            InputError: what cannot work there, by name.
        """
        if self.pin_memory:
            raise InputError(
                "InteractionStream(pin_memory=True) in a worker of a DataLoader, where CUDA cannot be used; "
                "expected DataLoader(pin_memory=True)"
            )
        if self._iterated_by_worker:
            raise InputError(
                "a stream in a worker of a DataLoader is iterated again at the same place: set_epoch does not reach "
                "persistent workers; expected DataLoader(persistent_workers=False)"
            )
        self._iterated_by_worker = True
        share = InteractionStream.__new__(InteractionStream)
        # A lock that was held when the process was forked would never be released: make new ones.
        vars(share).update(
            vars(self), worker=worker, workers=workers, _is_share=True, _meter=Meter(), _pool=BufferPool()
        )
        return share

    def _iterate(self, waiting: str) -> Iterator[Interactions]:
        """`waiting` names the counter of the time spent waiting for data."""
        info = get_worker_info()
        if info is not None and not self._is_share and self.workers == 1:
            yield from self._of_worker(info.id, info.num_workers)._iterate(waiting)
            return
        order, steps, epoch = self.order, self._steps(), self.epoch
        if not steps:
            return
        reader = ReadAhead(
            self.rows,
            self.columns,
            order,
            rank=self.rank,
            world=self.world,
            selection=self.selection,
            threads=self.config.chosen_threads,
            start=steps[0],
            meter=self._meter,
            pool=self._pool,
        )
        with reader:
            held: ShuffleWindow | None = None
            number = -1
            for step in steps:
                reader.check()
                if held is None or order.window_of(step) != number:
                    number, held = order.window_of(step), None
                    reader.release(number)
                    began = time.perf_counter()
                    held = reader.window(number, step)
                    self._meter.add(**{waiting: time.perf_counter() - began})
                began = time.perf_counter()
                batch = self._batch(held, epoch, step)
                self._meter.add(rows=batch.size, assemble=time.perf_counter() - began)
                yield batch

    def map(self, make: Callable[[Interactions], Made]) -> Iterator[Made]:
        """`make(batch)` of each batch of the next iteration, made by a background thread, up to
        `config.prefetch_batches` ahead: assembly, remapping and negative sampling overlap with the training step."""

        def timed(batch: Interactions) -> Made:
            began = time.perf_counter()
            found = make(batch)
            self._meter.add(assemble=time.perf_counter() - began)
            return found

        ahead = self.config.prefetch_batches
        rows = self._iterate("wait" if ahead == 0 else "behind")
        return in_background(timed, rows, ahead, lambda seconds: self._meter.add(wait=seconds))

    def _batch(self, made: ShuffleWindow, epoch: int, step: int) -> Interactions:
        tables, found, size = made.batch(step)
        return self._named(tables, found, epoch=epoch, step=step, size=size)

    def _named(
        self,
        tables: list[Table],
        found: Mapping[str, torch.Tensor | JaggedColumn],
        *,
        epoch: int,
        step: int,
        size: int,
    ) -> Interactions:
        """The columns in the roles of the schema."""
        schema = self.schema

        def dense(name: str | None) -> torch.Tensor | None:
            column = found.get(name) if name else None
            assert not isinstance(column, JaggedColumn)
            return column

        floats = [name for name in schema.floats if name in found]
        return Interactions(
            user=dense(schema.user),
            item=dense(schema.item),
            label=dense(schema.label),
            time=dense(schema.time),
            categorical={name: found[name] for name in schema.categorical if name in found},
            floats=_side_by_side(floats, tables, found) if floats else None,
            epoch=epoch,
            step=step,
            position=self.order.first_position(step, self.rank, self.world),
            size=size,
            tables=tables,
        )


def _side_by_side(
    names: list[str], tables: list[Table], found: Mapping[str, torch.Tensor | JaggedColumn]
) -> torch.Tensor:
    """(B, F) of F columns; where they lie together, by one transposition."""
    for known, values in tables:
        first = known.index(names[0]) if names[0] in known else len(known)
        if list(known[first : first + len(names)]) == names:
            return values[first : first + len(names)].t().contiguous()
    return torch.stack([column for name in names if isinstance(column := found[name], torch.Tensor)], dim=1)


class ResumableDataset(IterableDataset):
    """What `StreamDataset` and `KeyedBatches` share: their length, and a position that torchdata's StatefulDataLoader
    stores and restores, in each of its workers."""

    stream: InteractionStream

    def __len__(self) -> int:
        return len(self.stream)

    def state_dict(self) -> dict[str, int]:
        """`epoch` and `step` at which an iteration resumes after the last batch that the loader has taken."""
        return {"epoch": self.stream.epoch, "step": self.stream.next_step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """The next iteration starts there, and reads nothing before it."""
        self.stream.set_epoch(state["epoch"], state["step"])

    def _counted(self, batches: Iterator[Made]) -> Iterator[Made]:
        """The same batches; `next_step` of the stream follows them."""
        stream, info = self.stream, get_worker_info()
        each = stream.workers if info is None or stream.workers > 1 else info.num_workers
        stream.next_step = stream.start_step

        def counted() -> Iterator[Made]:
            with closing(batches):  # type: ignore[type-var]  # a generator
                for batch in batches:
                    stream.next_step = min(stream.next_step + each, stream.steps_per_epoch)
                    yield batch

        return counted()


class StreamDataset(ResumableDataset):
    """The stream for `DataLoader(StreamDataset(stream), batch_size=None, num_workers=n)`.

    Worker w takes the steps w, w + n, …; the loader takes from the workers in turn, so that the batches and
    their order are the same for any number of workers. Each worker decodes all of its rank's row groups. Workers
    that persist from epoch to epoch raise an error, since `set_epoch` does not reach them.
    """

    def __init__(self, stream: InteractionStream) -> None:
        self.stream = stream

    def __iter__(self) -> Iterator[Interactions]:
        return self._counted(iter(self.stream))
