"""`recpress train --follow`: online training on the files that are added to a log, one round of new files at a time.

The configured epochs are on the files that exist at the start. Then each round of new files is one more epoch. Rank 0
checks for new files and broadcasts them, so that all ranks have the same rounds. A checkpoint holds the files of all
rounds, and a resumed run continues the round that it was in.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from recpress.data.dataset import object_store
from recpress.data.dataset.growing_log import GrowingLog, Taken, open_round, refuse_new_ids
from recpress.data.dataset.log import SIDES, Log, Side
from recpress.data.dataset.parquet_split import ParquetSplit
from recpress.data.errors import InputError
from recpress.data.sampling.selection import Selection
from recpress.data.stream.batch import Batch
from recpress.data.stream.loader import InteractionStream
from recpress.modules.hashing.id_map import IdMap
from recpress.trainer.config import TrainConfig
from recpress.trainer.distributed.rank_errors import raise_on_all_ranks
from recpress.trainer.loop.training_data import Next, TrainingData
from recpress.trainer.train.unknown_ids import UnknownIds

logger = logging.getLogger(__name__)
TICK = 1.0
"""Seconds between two checks for a signal while the run waits for files."""


def first_round(config: TrainConfig, checkpoints: str) -> list[str]:
    """Names of the files of the first round: those of the run's checkpoints, else all complete files. Collective.

    Raises:
        InputError: the log cannot grow; it has no complete file. On every rank.
    """
    names: list[Any] = [None]
    with raise_on_all_ranks():
        if dist.get_rank() == 0:
            found = _first_round_of_checkpoints(checkpoints) if config.checkpoint.resume else None
            names = [found or [file["name"] for file in GrowingLog(config.data).new_files()]]
            if not names[0]:
                raise InputError(f"{config.data}: no complete file of train yet; expected at least one")
    dist.broadcast_object_list(names)
    return list(names[0])


def _first_round_of_checkpoints(folder: str) -> list[str] | None:
    """Read it from the newest valid checkpoint; all have the same."""
    for name in sorted(object_store.list_files(folder), reverse=True):
        if name.startswith("step-") and name.endswith("/run.json"):
            try:
                rounds = json.loads(object_store.read_bytes(object_store.join(folder, name)))["source"]["rounds"]
            except (ValueError, KeyError, TypeError, OSError):  # corrupt, or not of an online run
                continue
            return [file["name"] for file in rounds[0]]
    return None


class OnlineData(TrainingData):
    """A log that grows.

    On a side with an id map, ids that are new since the start use the embedding rows that the map has for unknown ids,
    and are counted. On a side without one they are an error.

    Args:
        make_stream: rows of a round -> its stream on this rank.
        maps: "user", "item" -> its id map.
    """

    grows = True

    def __init__(
        self,
        config: TrainConfig,
        log: Log,
        stream: InteractionStream,
        make_stream: Callable[[ParquetSplit], InteractionStream],
        maps: Mapping[str, IdMap] | None = None,
    ) -> None:
        super().__init__(stream, log.bad_files)
        self.config, self._base, self._make_stream = config, log.train, make_stream
        refused = {side: _advice(config, side, side in (maps or {})) for side in SIDES}
        self._advice = {log.column(side): text for side, text in refused.items() if text}
        self._any_id = [log.column(side) for side in SIDES if not refused[side]]
        known: dict[str, int] = {side: log.num_ids(side) for side in SIDES if not refused[side]}
        self.unknown = UnknownIds(known) if known else None
        self._reported = dict.fromkeys(known, 0)
        self.rounds: list[list[Taken]] = [
            [{key: file[key] for key in ("name", "size", "fingerprint")} for file in log.inputs()]
        ]
        self._rows = [stream.num_rows]  # of the sample, per round
        self._growing = GrowingLog(config.data)
        self._opened: tuple[int, InteractionStream] | None = None

    @property
    def num_rows(self) -> int:
        return sum(self._rows)

    def stream_of(self, epoch: int) -> InteractionStream:
        number = epoch - self.config.epochs + 1
        if number < 1:
            return self.stream
        if self._opened is None or self._opened[0] != number:
            with raise_on_all_ranks():
                self._opened = number, self._make_stream(self._open(number))
        return self._opened[1]

    def has_epoch(self, epoch: int) -> bool:
        return epoch - self.config.epochs + 1 < len(self.rounds)

    def wait_for_epoch(self, signal: Callable[[], str | None]) -> Next:
        self._report_unknown()
        start, last_check = time.monotonic(), float("-inf")
        follow = self.config.follow
        while True:
            stop = torch.tensor([signal() is not None], dtype=torch.int32)
            dist.all_reduce(stop, dist.ReduceOp.MAX)
            if int(stop):
                return "stop"
            found: list[Any] = [None]
            if dist.get_rank() == 0 and time.monotonic() - last_check >= follow.seconds:
                found, last_check = [self._new_files()], time.monotonic()
                if not found[0] and follow.idle_minutes and last_check - start >= 60 * follow.idle_minutes:
                    found = ["end"]
            dist.broadcast_object_list(found)
            if found[0] == "end":
                return "end"
            if found[0]:
                self._add_round(found[0])
                return "epoch"
            time.sleep(min(TICK, follow.seconds))

    def _new_files(self) -> list[Taken]:
        """New files, found by rank 0; none while they have fewer rows in the sample than there are ranks."""
        try:
            found = self._growing.new_files({file["name"] for files in self.rounds for file in files})
        except InputError as error:
            logger.warning("%s; checking again in %g s", error, self.config.follow.seconds)
            return []
        if not found or self._count(found) < dist.get_world_size():
            return []
        return found

    def _count(self, files: Sequence[Taken]) -> int:
        try:
            rows = open_round(self._base, self._before(len(self.rounds)), files, any_id=self._any_id)
        except InputError:  # all ranks find it in `stream_of`, and raise it there
            return dist.get_world_size()
        return Selection(rows, self.stream.sample).num_rows

    def _add_round(self, files: list[Taken]) -> None:
        self.rounds.append(files)
        stream = self.stream_of(self.config.epochs + len(self.rounds) - 2)
        self._rows.append(stream.num_rows)
        if dist.get_rank() == 0:
            each = ", ".join(file["name"].rsplit("/", 1)[-1] for file in files[:3])
            more = f" and {len(files) - 3} more" if len(files) > 3 else ""
            logger.info(f"round {len(self.rounds) - 1}: {each}{more}, {stream.num_rows:,} rows of the sample")

    def _before(self, number: int) -> list[Taken]:
        return [file for files in self.rounds[:number] for file in files]

    def _open(self, number: int) -> ParquetSplit:
        rows = open_round(self._base, self._before(number), self.rounds[number], any_id=self._any_id)
        if not self.skips:  # otherwise row groups with new ids are skipped
            refuse_new_ids(rows, self._advice)
        return rows

    def batch_taken(self, batch: Batch) -> None:
        if self.unknown is not None:
            self.unknown.batch_taken(batch)

    def batch_trained(self) -> None:
        if self.unknown is not None:
            self.unknown.batch_trained()

    def batches_dropped(self) -> None:
        if self.unknown is not None:
            self.unknown.batches_dropped()

    def scalars(self) -> dict[str, float]:
        counts = {} if self.unknown is None else self.unknown.reduce()
        return super().scalars() | {f"hash/unknown_{side}s": float(rows) for side, rows in counts.items()}

    def _report_unknown(self) -> None:
        """Log the unknown ids of the round that has just ended."""
        total: dict[str, int] = {} if self.unknown is None else self.unknown.total
        if total != self._reported and dist.get_rank() == 0:
            each = ", ".join(
                f"{rows - self._reported[side]:,} rows with {side}s that the map does not know ({rows:,} in total)"
                for side, rows in total.items()
            )
            logger.info(f"round {len(self.rounds) - 1}: {each}; these share hashed rows")
        self._reported = dict(total)

    def describe(self) -> dict[str, Any]:
        unknown = {} if self.unknown is None else {"unknown_ids": dict(self.unknown.total)}
        return super().describe() | {"rounds": self.rounds} | unknown

    def state(self) -> dict[str, Any]:
        unknown = {} if self.unknown is None else {"unknown_ids": dict(self.unknown.total)}
        return super().state() | {"rounds": self.rounds, "round_rows": self._rows} | unknown

    def restore(self, state: Mapping[str, Any]) -> None:
        super().restore(state)
        self.rounds, self._rows = list(state["rounds"]), list(state["round_rows"])
        if self.unknown is not None:
            self.unknown.restore(state.get("unknown_ids", {}))
            self._reported = dict(self.unknown.total)


def _advice(config: TrainConfig, side: Side, mapped: bool) -> str | None:
    """How to fix an id of a later round that the tables of this side do not have; None if its map has a row for it."""
    features = config.user_features if side == "user" else config.item_features
    if mapped and features:
        return f"{side}s.parquet was read at the start and has no {', '.join(features)} of it: start a new run"
    if mapped:
        return None
    if config.model.tables.strategy == "random":
        again = "start a new run with this file in the log, with larger tables"
    else:
        again = "factorize the log with this file, and start a new run from these factors"
    rows = f"the table has the {side}s of the files of the start"
    return f"{rows}: give maps (--hash), where new ones share rows, or {again}"
