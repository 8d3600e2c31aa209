"""The output of a run: Parquet parts, each atomic, so that a run that was stopped resumes after the last of them.

A local run writes its parts to `OUT.unfinished`, which becomes OUT when it has all parts and a manifest. On an object
store, which cannot rename, the parts are in OUT, and OUT is complete once it has a manifest. The file `run.json` says
with which settings and inputs the parts are made.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
import torch.distributed as dist

from recpress.data.dataset import artifact, object_store
from recpress.data.dataset.atomic import replacing
from recpress.data.dataset.files import first_line, resolve, retried
from recpress.data.errors import InputError
from recpress.trainer.distributed.collectives import all_reduce
from recpress.trainer.distributed.heartbeat import activity, barrier
from recpress.trainer.distributed.rank_errors import raise_on_all_ranks

KIND = "recommendations"
FOLDER = "recommendations"
"""Folder of the parts in the artifact: `pyarrow.parquet.read_table` reads all of it."""
UNKNOWN = "unknown_users.parquet"
RUN = "run.json"
"""File with the settings and inputs of the run, and what it has measured."""
MEASURED = "measured"
_SHORT = ("short", "empty")


@dataclass(frozen=True)
class Share:
    """Which users this rank writes: every world-th of the parts that remain. Slots number its users."""

    parts: np.ndarray
    """Numbers of the parts that remain, ascending, on all ranks."""
    users_per_part: int
    num_users: int
    rank: int
    world: int

    @property
    def rounds(self) -> int:
        """Parts of this rank; the last may not exist."""
        return -(-len(self.parts) // self.world)

    @property
    def slots(self) -> int:
        return self.rounds * self.users_per_part

    @property
    def filled(self) -> np.ndarray:
        """Slots that have a user."""
        return np.concatenate(
            [np.empty(0, np.int64)]
            + [round * self.users_per_part + np.arange(self.size(round)) for round in range(self.rounds)]
        )

    def part(self, round: int) -> int | None:
        """The part that this rank writes in a round."""
        place = round * self.world + self.rank
        return int(self.parts[place]) if place < len(self.parts) else None

    def start(self, round: int) -> int:
        """Position of the first user of this rank in a round."""
        part = self.part(round)
        return 0 if part is None else part * self.users_per_part

    def size(self, round: int) -> int:
        """Users of this rank in a round."""
        return 0 if self.part(round) is None else min(self.users_per_part, self.num_users - self.start(round))

    def sizes(self, round: int) -> list[int]:
        """Users of each rank in a round; the first has the most."""
        return [replace(self, rank=rank).size(round) for rank in range(self.world)]

    def locate(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(rank, slot) of users by position; rank -1 for position -1 and for users of parts that exist already."""
        part = positions // self.users_per_part
        place = np.minimum(np.searchsorted(self.parts, part), len(self.parts) - 1)
        remains = (positions >= 0) & (self.parts[place] == part)
        owner = np.where(remains, place % self.world, -1)
        return owner, place // self.world * self.users_per_part + positions % self.users_per_part


class Output:
    """The folder that the parts are written to. `open`, `begin`, `short_lists` and `finish` are collective.

    Args:
        path: of the artifact.
        run: settings and inputs, (name -> JSON value), with which parts of an earlier run must agree.
        rows: number of users of each part.
    """

    def __init__(self, path: str, run: Mapping[str, Any], rows: Sequence[int]) -> None:
        self.path, self.run, self.rows = path, json.loads(json.dumps(run)), rows
        self.remote = artifact.is_remote(path)
        self.folder = path if self.remote else f"{path.rstrip('/')}.unfinished"
        self.measured: dict[str, Any] = {}
        """What this run, or one that it resumes, has measured: entries of the manifest."""
        self._is_new = False
        self._short = dict.fromkeys(_SHORT, 0)  # of the parts of this rank, and on rank 0 of those of earlier runs

    def open(self, *, overwrite: bool, inputs: Sequence[str]) -> np.ndarray:
        """The numbers of the parts that remain: all, or those that an earlier run did not write. Changes nothing.

        The caller has claimed `path`.

        Raises:
            InputError: `path` exists and `overwrite` is false; parts are of a run with other settings or inputs. On
                every rank.
        """
        found: list[Any] = [np.empty(0), {}]
        with raise_on_all_ranks():
            if dist.get_rank() == 0:
                found = [self._open(overwrite, inputs), self.measured]
        dist.broadcast_object_list(found)
        remain, self.measured = found
        return remain

    def _open(self, overwrite: bool, inputs: Sequence[str]) -> np.ndarray:
        found = object_store.list_files(self.folder)
        unfinished = RUN in found and (artifact.MANIFEST not in found or not self.remote)
        if not self.remote or not unfinished:
            artifact.check_target(self.path, overwrite, KIND, inputs)
        if not unfinished:
            if not self.remote and Path(self.folder).exists():
                raise InputError(f"{self.folder}: exists, and has no {RUN}; remove it, or choose another --out")
            return self._all()
        before = self._run_before()
        self.measured = before.pop(MEASURED, {})
        if changed := self._changes(before):
            self.measured = {}
            if not overwrite:
                raise InputError(
                    f"{self.folder}: has parts of a run with other settings or inputs ({changed}); to start again: "
                    "--overwrite, or another --out"
                )
            return self._all()
        return np.array([part for part in range(len(self.rows)) if not self._is_complete(part, found)], dtype=np.int64)

    def _run_before(self) -> dict[str, Any]:
        """What `begin` wrote for the run that the folder is of."""
        try:
            return dict(json.loads(object_store.read_bytes(self._address(RUN))))
        except ValueError:
            return {}

    def _changes(self, before: dict[str, Any]) -> str:
        """What differs from the run `before`, in words."""
        return "; ".join(
            f"{name}: {before.get(name)!r} -> {self.run.get(name)!r}"
            for name in sorted(before.keys() | self.run.keys())
            if before.get(name) != self.run.get(name)
        )

    def _all(self) -> np.ndarray:
        self._is_new = True
        return np.arange(len(self.rows))

    def begin(self, measured: Mapping[str, Any]) -> None:
        """Create the folder, unless an earlier run has, and remove what it replaces. Before the first `write`.

        Args:
            measured: entries of the manifest, which a run that resumes after the last part could not measure.
        """
        self.measured = json.loads(json.dumps(measured))
        with raise_on_all_ranks():
            if dist.get_rank() != 0:
                return
            if self._is_new:
                if self.remote:
                    artifact.prepare(self.path, overwrite=True)
                else:
                    shutil.rmtree(self.folder, ignore_errors=True)
            text = json.dumps({**self.run, MEASURED: self.measured}, indent=1) + "\n"
            object_store.write_bytes(self._address(RUN), text.encode())

    def _is_complete(self, part: int, found: Mapping[str, int]) -> bool:
        name = part_name(part)
        if name not in found:
            return False
        filesystem, path = resolve(self._address(name))

        def footer() -> pq.FileMetaData:
            with filesystem.open_input_file(path) as source, pq.ParquetFile(source) as file:
                return file.metadata

        try:
            read = retried(filesystem, name, footer)
            short = {key: int(read.metadata[key.encode()]) for key in _SHORT}
        except (pa.ArrowException, OSError, KeyError, TypeError):
            return False  # corrupt, or of an earlier release: it is written again
        if read.num_rows != self.rows[part]:
            return False
        self._add(short)
        return True

    def _add(self, short: Mapping[str, int]) -> None:
        self._short = {key: self._short[key] + short[key] for key in _SHORT}

    def write_part(self, part: int, table: pa.Table, k: int) -> None:
        """Write a part: see `write`. Its footer counts the users with fewer than k items, and those without any."""
        lengths = pc.list_value_length(table.column("items")).to_numpy()
        short = {"short": int((lengths < k).sum()), "empty": int((lengths == 0).sum())}
        self.write(part_name(part), table.replace_schema_metadata({key: str(count) for key, count in short.items()}))
        self._add(short)

    def short_lists(self) -> dict[str, int]:
        """Users with fewer than K items (`short`), and those of them without any (`empty`), in all parts."""
        return dict(zip(_SHORT, all_reduce(torch.tensor([self._short[key] for key in _SHORT])).tolist(), strict=True))

    def write(self, name: str, table: pa.Table) -> None:
        """Write one file, atomically and durably."""
        given = {"compression": "zstd", "use_dictionary": ["items.list.element"]}
        try:
            if self.remote:
                with tempfile.TemporaryDirectory(prefix="recpress-") as folder:
                    local = Path(folder) / "part.parquet"
                    pq.write_table(table, local, **given)
                    object_store.upload_file(local, self._address(name))
                return
            target = Path(self.folder) / name
            target.parent.mkdir(exist_ok=True)
            with replacing(target) as temporary:
                pq.write_table(table, temporary, **given)
        except (OSError, pa.ArrowException) as error:
            raise InputError(f"{self._address(name)}: cannot be written: {first_line(error)}") from error

    def finish(self, meta: dict[str, Any], *, overwrite: bool) -> None:
        """Publish the artifact, once all ranks have written their parts."""
        barrier()
        with activity(f"writing {self.path}"), raise_on_all_ranks():
            if dist.get_rank() == 0:
                if self.remote:
                    artifact.publish(self.path, KIND, meta, self._contents())
                else:
                    for name in (artifact.MANIFEST, f"{FOLDER}/.*.part"):  # of a run that was killed
                        for leftover in Path(self.folder).glob(name):
                            leftover.unlink()
                    artifact.commit(Path(self.folder), self.path, KIND, meta, overwrite=overwrite)
        barrier()

    def _contents(self) -> list[dict[str, Any]]:
        filesystem, root = resolve(self.path)
        return [
            {"name": name, "size": size, "fingerprint": artifact.fingerprint(f"{root}/{name}", filesystem)}
            for name, size in object_store.list_files(self.path).items()
            if name != artifact.UNFINISHED
        ]

    def _address(self, name: str) -> str:
        return object_store.join(self.folder, name)


def part_name(part: int) -> str:
    """Name of the file of a part, in the artifact."""
    return f"{FOLDER}/part-{part:05d}.parquet"
