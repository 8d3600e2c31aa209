"""Artifacts that all ranks write, and the factors that the stages hand on."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch.distributed as dist

from recpress.data.config import SampleConfig
from recpress.data.dataset import artifact, claim
from recpress.data.dataset.log import Log
from recpress.data.errors import InputError
from recpress.modules.als.factors import FactorName, FactorTable
from recpress.trainer.distributed.heartbeat import activity, barrier
from recpress.trainer.distributed.rank_errors import raise_on_all_ranks

FACTORS = "factors"
MODEL = "model"
CROSSFIT = "crossfit"
"""Folder, inside an artifact of factors, of those that have not seen a sample of the rows."""


@contextmanager
def claimed(*paths: str) -> Iterator[None]:
    """Claims outputs (artifacts, folders of checkpoints) for this run until the block ends. Collective.

    For stages that work long before `shared_artifact` makes their output; that may claim the same path again.

    Raises:
        InputError: another run writes to one of them. On every rank.
    """
    with ExitStack() as claims:
        with raise_on_all_ranks():
            if dist.get_rank() == 0:
                for path in paths:
                    artifact.check_name(path)
                    claims.enter_context(claim.claimed(path))
        yield


@contextmanager
def shared_artifact(
    path: str, kind: str, meta: dict[str, Any], *, overwrite: bool = False, inputs: Sequence[str | None] = ()
) -> Iterator[Path]:
    """A temporary folder to write into, which becomes `path` when all ranks have ended the block. Collective.

    Rank 0 makes it, writes the manifest from `meta` and renames it; where any rank raises, it is removed. Of a remote
    `path` the folder is local, and ranks that do not see rank 0's disk have one each: what all of them wrote is
    uploaded, each file once.

    Args:
        inputs: addresses of what the stage reads (None: nothing); `path` must be apart from them.

    Raises:
        InputError: `path` exists, and is not to be overwritten or of another kind; it is, contains or lies in an input;
            another run writes there; it cannot be written. On every rank.
    """
    names: list[Path | None] = [None]
    with raise_on_all_ranks():
        if dist.get_rank() == 0:
            given = [name for name in inputs if name]
            names = [artifact.begin(path, overwrite=overwrite, kind=kind, inputs=given)]
    dist.broadcast_object_list(names)
    tmp = names[0]
    assert tmp is not None
    own = dist.get_rank() == 0
    if artifact.is_remote(path) and not _sees(tmp):
        tmp, own = Path(tempfile.mkdtemp(prefix="recpress-")), True
    try:
        yield tmp
        barrier()
        with activity(f"writing {path}"):
            if artifact.is_remote(path):
                _publish(tmp, own, path, kind, meta, overwrite)
            elif own:
                artifact.commit(tmp, path, kind, meta, overwrite=overwrite)
        barrier()
    finally:
        if own:
            artifact.abort(tmp)


def _sees(folder: Path) -> bool:
    """Whether this rank has rank 0's disk."""
    return folder.is_dir()


def _publish(tmp: Path, own: bool, path: str, kind: str, meta: dict[str, Any], overwrite: bool) -> None:
    """Each rank that has a folder uploads its files; rank 0 then lists them all in the manifest."""
    with raise_on_all_ranks():
        if dist.get_rank() == 0:
            artifact.prepare(path, overwrite=overwrite)
    contents: list[dict[str, Any]] = []
    with raise_on_all_ranks():
        if own:
            contents = artifact.upload(tmp, path)
    parts: list[list[dict[str, Any]]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(parts, contents)
    with raise_on_all_ranks():
        if dist.get_rank() == 0:
            listed = {entry["name"]: entry for part in parts for entry in part}  # replicas are written by several
            artifact.publish(path, kind, meta, [listed[name] for name in sorted(listed)])


def describe_log(log: Log) -> dict[str, Any]:
    """What a manifest says of the log that an artifact was made from."""
    return {
        "path": log.path,
        "rows": log.train.num_rows,
        "num_users": log.num_users,
        "num_items": log.num_items,
        "vocabularies": {side: log.vocabulary_fingerprint(side) for side in ("user", "item")},
        "files": log.inputs(),
    }


def check_vocabulary(path: str, manifest: dict[str, Any], log: Log) -> None:
    """Raise InputError where the artifact at `path` was made for other ids than the log's."""
    made_for = manifest["log"]
    for side, here in (("user", log.num_users), ("item", log.num_items)):
        there = made_for[f"num_{side}s"]
        if there != here:
            raise InputError(f"{path}: made for {there} {side}s ({made_for['path']}), but {log.path} has {here}")
        if made_for["vocabularies"][side] != log.vocabulary_fingerprint(side):  # type: ignore[arg-type]
            raise InputError(
                f"{path}: made for another {side} vocabulary than that of {log.path}: "
                f"the same dense ids mean other {side}s"
            )


@dataclass(frozen=True)
class FactorsArtifact:
    """Factors of a log on disk."""

    path: str
    manifest: dict[str, Any]

    @property
    def dim(self) -> int:
        """Dimension of the vectors, biases included."""
        return int(self.manifest["dim"])

    @property
    def crossfit(self) -> SampleConfig | None:
        """The sample that the cross-fitted factors have not seen; None where there are none."""
        sample = self.manifest["crossfit"]
        return None if sample is None else SampleConfig(**sample)

    def has_not_seen(self, log: Log, sample: SampleConfig) -> bool:
        """Whether the cross-fitted factors have not seen the rows of this sample of the log.

        The log may be the one that they were made from, or a sample of that, as `recpress sample` writes it.
        """
        made_from = _prints(self.manifest["log"]["files"])
        if self.crossfit is None or log.sample_of is None or made_from == _prints(log.inputs()):
            return self.crossfit == sample
        return self.crossfit == SampleConfig(**log.sample_of["sample"]) and made_from == _prints(log.sample_of["files"])

    def table(self, side: Literal["user", "item"], *, crossfit: bool = False) -> FactorTable:
        """(n, dim) float32, read by memory map; of remote factors, after fetching the files of this side."""
        return self._open(side, crossfit)

    def counts(self, side: Literal["user", "item"], *, crossfit: bool = False) -> FactorTable:
        """(n, 1) float32, distinct pairs of each id, read by memory map."""
        return self._open("user_count" if side == "user" else "item_count", crossfit)

    def _open(self, table: FactorName, crossfit: bool) -> FactorTable:
        below = f"{CROSSFIT}/" if crossfit else ""
        with activity(f"fetching {self.path}"):
            folder = artifact.fetch(self.path, self.manifest, f"{below}{table}-*")
        return FactorTable(folder / below, table)


def _prints(files: list[dict[str, Any]]) -> list[tuple[int, str]]:
    return [(file["size"], file["fingerprint"]) for file in files]


def open_factors(path: str, log: Log) -> FactorsArtifact:
    """Raises InputError where there are none at `path`, or they belong to another vocabulary."""
    manifest = artifact.read_manifest(path, FACTORS)
    check_vocabulary(path, manifest, log)
    return FactorsArtifact(path, manifest)
