"""Artifacts that all ranks write together, and the artifact of `recpress factorize`."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from recpress.data.config import SampleConfig
from recpress.data.dataset import artifact, claim
from recpress.data.dataset.log import Log, Side
from recpress.data.errors import InputError
from recpress.modules.als.factors import FactorName, FactorTable
from recpress.trainer.distributed.heartbeat import activity, barrier
from recpress.trainer.distributed.rank_errors import raise_on_all_ranks

FACTORS = "factors"
MODEL = "model"
CROSSFIT = "crossfit"
"""Folder of the cross-fitted factors, which have not seen a sample of the rows, inside an artifact of factors."""


@contextmanager
def claimed(*paths: str) -> Iterator[None]:
    """Claim outputs (artifacts, folders of checkpoints) for this run until the end of the block. Collective.

    For stages that work for long before `shared_artifact`, which may claim the same path again.

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

    Rank 0 creates it, writes the manifest from `meta`, and renames it. If any rank raises, it is removed. For a remote
    `path` the folder is local; ranks that do not see the disk of rank 0 have one each. Their files are uploaded, each
    once.

    Args:
        inputs: paths of the inputs of the stage (None is ignored); `path` must not overlap them.

    Raises:
        InputError: `path` exists and `overwrite` is false, or it is of another kind; it overlaps an input; another run
            writes to it; it cannot be written. On every rank.
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
    """Whether this rank sees the disk of rank 0."""
    return folder.is_dir()


def _publish(tmp: Path, own: bool, path: str, kind: str, meta: dict[str, Any], overwrite: bool) -> None:
    """Upload the files of each rank with a folder; rank 0 then writes the manifest that lists them all."""
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
            listed = {entry["name"]: entry for part in parts for entry in part}  # several ranks write replicas
            artifact.publish(path, kind, meta, [listed[name] for name in sorted(listed)])


def describe_log(log: Log) -> dict[str, Any]:
    """Entry of the manifest about the log of an artifact."""
    return {
        "path": log.path,
        "rows": log.train.num_rows,
        "num_users": log.num_users,
        "num_items": log.num_items,
        "vocabularies": {side: log.vocabulary_fingerprint(side) for side in ("user", "item")},
        "files": log.inputs(),
    }


def check_vocabulary(path: str, manifest: dict[str, Any], log: Log) -> None:
    """Raise InputError if the artifact at `path` was made for other ids than those of the log."""
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
        """Dimension of the vectors, with biases."""
        return int(self.manifest["dim"])

    @property
    def crossfit(self) -> SampleConfig | None:
        """The sample that the cross-fitted factors have not seen; None without such factors."""
        sample = self.manifest["crossfit"]
        return None if sample is None else SampleConfig(**sample)

    @property
    def fingerprint(self) -> str:
        """Of the vectors, without the cross-fitted ones."""
        files = [(file["name"], file["fingerprint"]) for file in self.manifest["contents"]]
        vectors = sorted(file for file in files if file[0].startswith(("user-", "item-")))
        return hashlib.sha256(json.dumps(vectors).encode()).hexdigest()[:16]

    def has_not_seen(self, log: Log, sample: SampleConfig) -> bool:
        """Whether the cross-fitted factors have not seen this sample of the log.

        The log may be their own log, or a sample of it that `recpress sample` wrote.
        """
        made_from = fingerprints_of(self.manifest["log"]["files"])
        if self.crossfit is None or log.sample_of is None or made_from == fingerprints_of(log.inputs()):
            return self.crossfit == sample
        return self.crossfit == SampleConfig(**log.sample_of["sample"]) and made_from == fingerprints_of(
            log.sample_of["files"]
        )

    def table(self, side: Side, *, crossfit: bool = False) -> FactorTable:
        """(n, dim) float32, memory-mapped. Remote factors are downloaded first, the files of this side only."""
        return self._open(side, crossfit)

    def counts(self, side: Side, *, crossfit: bool = False) -> FactorTable:
        """(n, 1) float32, distinct pairs of each id, memory-mapped."""
        return self._open("user_count" if side == "user" else "item_count", crossfit)

    def _open(self, table: FactorName, crossfit: bool) -> FactorTable:
        below = f"{CROSSFIT}/" if crossfit else ""
        with activity(f"fetching {self.path}"):
            folder = artifact.fetch(self.path, self.manifest, f"{below}{table}-*")
        return FactorTable(folder / below, table)


def fingerprints_of(files: list[dict[str, Any]]) -> list[tuple[int, str]]:
    """Size and fingerprint of each file of a log; equal for the same content under other names."""
    return [(file["size"], file["fingerprint"]) for file in files]


def open_factors(path: str, log: Log) -> FactorsArtifact:
    """The factors at `path`. Raises InputError if there are none, or they are for other ids than those of the log."""
    manifest = artifact.read_manifest(path, FACTORS)
    check_vocabulary(path, manifest, log)
    return FactorsArtifact(path, manifest)
