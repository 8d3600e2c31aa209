"""`recpress train --follow`: the files that come to a log while it is trained on, round after round.

Rank 0 looks for new files and tells the others, so that all have the same rounds. Epochs are those of the files known
at the start; then each round of new files is one epoch more. A checkpoint holds the files of all rounds, and a run that
goes on takes up the round that it was in.
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
from recpress.data.dataset.log import Log, Side
from recpress.data.dataset.parquet_split import ParquetSplit
from recpress.data.errors import InputError
from recpress.data.sampling.selection import Selection
from recpress.data.stream.batch import Batch
from recpress.data.stream.stream import InteractionStream
from recpress.modules.hashing.id_map import IdMap
from recpress.trainer.artifacts.id_maps import SIDES
from recpress.trainer.config import TrainConfig
from recpress.trainer.distributed.rank_errors import raise_on_all_ranks
from recpress.trainer.loop.source import Next, Source
from recpress.trainer.train.unknown_ids import UnknownIds

logger = logging.getLogger(__name__)

TICK = 1.0
"""Seconds between two answers to a signal, while the run waits for files."""


def first_round(config: TrainConfig, checkpoints: str) -> list[str]:
    """Names of the files that the run starts with: those of its checkpoints, else the whole ones there are. Collective.

    Raises:
        InputError: a log that cannot grow; no whole file. On every rank.
    """
    names: list[Any] = [None]
    with raise_on_all_ranks():
        if dist.get_rank() == 0:
            found = _of_checkpoints(checkpoints) if config.checkpoint.resume else None
            names = [found or [file["name"] for file in GrowingLog(config.data).new_files()]]
            if not names[0]:
                raise InputError(f"{config.data}: no whole file of train yet; expected one at least to start with")
    dist.broadcast_object_list(names)
    return list(names[0])


def _of_checkpoints(folder: str) -> list[str] | None:
    """All checkpoints of a run say the same of its first round."""
    for name in sorted(object_store.list_files(folder), reverse=True):
        if name.startswith("step-") and name.endswith("/run.json"):
            try:
                rounds = json.loads(object_store.read_bytes(object_store.join(folder, name)))["source"]["rounds"]
            except (ValueError, KeyError, TypeError, OSError):  # damaged, or not of a run that follows
                continue
            return [file["name"] for file in rounds[0]]
    return None


class FollowedSource(Source):
    """The rows of a log that grows.

    Ids that came since the start get the row that a map has for ids that it does not know, and are counted, where their
    side has a map; otherwise they are refused.

    Args:
        make: rows of a round -> its stream on this rank.
        maps: "user", "item" -> the map of its ids.
    """

    grows = True

    def __init__(
        self,
        config: TrainConfig,
        log: Log,
        stream: InteractionStream,
        make: Callable[[ParquetSplit], InteractionStream],
        maps: Mapping[str, IdMap] | None = None,
    ) -> None:
        super().__init__(stream, log.bad_files)
        self.config, self._base, self._make = config, log.train, make
        refused = {side: _advice(config, side, side in (maps or {})) for side in SIDES}
        self._advice = {log.column(side): text for side, text in refused.items() if text}
        self._any_id = [log.column(side) for side in SIDES if not refused[side]]
        known: dict[str, int] = {side: log.num_ids(side) for side in SIDES if not refused[side]}
        self.unknown = UnknownIds(known) if known else None
        self._said = dict.fromkeys(known, 0)
        self.rounds: list[list[Taken]] = [
            [{key: file[key] for key in ("name", "size", "fingerprint")} for file in log.inputs()]
        ]
        self._rows = [stream.num_rows]  # of the sample, of each round
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
                self._opened = number, self._make(self._open(number))
        return self._opened[1]

    def known(self, epoch: int) -> bool:
        return epoch - self.config.epochs + 1 < len(self.rounds)

    def wait(self, signal: Callable[[], str | None]) -> Next:
        self._say_unknown()
        began, looked = time.monotonic(), float("-inf")
        follow = self.config.follow
        while True:
            stop = torch.tensor([signal() is not None], dtype=torch.int32)
            dist.all_reduce(stop, dist.ReduceOp.MAX)
            if int(stop):
                return "stop"
            said: list[Any] = [None]
            if dist.get_rank() == 0 and time.monotonic() - looked >= follow.seconds:
                said, looked = [self._look()], time.monotonic()
                if not said[0] and follow.idle_minutes and looked - began >= 60 * follow.idle_minutes:
                    said = ["end"]
            dist.broadcast_object_list(said)
            if said[0] == "end":
                return "end"
            if said[0]:
                self._take(said[0])
                return "round"
            time.sleep(min(TICK, follow.seconds))

    def _look(self) -> list[Taken]:
        """New files, of rank 0; none where their rows of the sample are fewer than the ranks, until more come."""
        try:
            found = self._growing.new_files({file["name"] for files in self.rounds for file in files})
        except InputError as error:
            logger.warning("%s; looks again in %g s", error, self.config.follow.seconds)
            return []
        if not found or self._count(found) < dist.get_world_size():
            return []
        return found

    def _count(self, files: Sequence[Taken]) -> int:
        try:
            rows = open_round(self._base, self._before(len(self.rounds)), files, any_id=self._any_id)
        except InputError:  # found by all ranks in `stream_of`, and said there
            return dist.get_world_size()
        return Selection(rows, self.stream.sample).num_rows

    def _take(self, files: list[Taken]) -> None:
        self.rounds.append(files)
        stream = self.stream_of(self.config.epochs + len(self.rounds) - 2)
        self._rows.append(stream.num_rows)
        if dist.get_rank() == 0:
            each = ", ".join(file["name"].rsplit("/", 1)[-1] for file in files[:3])
            more = f" and {len(files) - 3} more" if len(files) > 3 else ""
            logger.info(
                "round %d: %s%s, %s rows of the sample", len(self.rounds) - 1, each, more, f"{stream.num_rows:,}"
            )

    def _before(self, number: int) -> list[Taken]:
        return [file for files in self.rounds[:number] for file in files]

    def _open(self, number: int) -> ParquetSplit:
        rows = open_round(self._base, self._before(number), self.rounds[number], any_id=self._any_id)
        if not self.skips:  # otherwise their row groups are left out
            refuse_new_ids(rows, self._advice)
        return rows

    def take(self, batch: Batch) -> None:
        if self.unknown is not None:
            self.unknown.take(batch)

    def trained(self) -> None:
        if self.unknown is not None:
            self.unknown.trained()

    def drop(self) -> None:
        if self.unknown is not None:
            self.unknown.drop()

    def scalars(self) -> dict[str, float]:
        counts = {} if self.unknown is None else self.unknown.share()
        return super().scalars() | {f"hash/unknown_{side}s": float(rows) for side, rows in counts.items()}

    def _say_unknown(self) -> None:
        """What the round that has just ended had."""
        total: dict[str, int] = {} if self.unknown is None else self.unknown.total
        if total != self._said and dist.get_rank() == 0:
            each = ", ".join(
                f"{rows - self._said[side]:,} rows with {side}s that the map does not know ({rows:,} in all)"
                for side, rows in total.items()
            )
            logger.info("round %d: %s; these share hashed rows", len(self.rounds) - 1, each)
        self._said = dict(total)

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
            self._said = dict(self.unknown.total)


def _advice(config: TrainConfig, side: Side, mapped: bool) -> str | None:
    """What to do about an id of a later round that the tables of this side do not have; None: its map has a row."""
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
