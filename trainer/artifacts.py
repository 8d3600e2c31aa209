"""Artifacts that all ranks write, and the factors that the stages hand on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch.distributed as dist
from recpress.data import artifact
from recpress.data.config import SampleConfig
from recpress.data.errors import InputError
from recpress.data.log import Log
from recpress.modules.factors import FactorTable
from recpress.trainer.distributed import agreed

FACTORS = "factors"
MODEL = "model"
CROSSFIT = "crossfit"
"""Folder, inside an artifact of factors, of those that have not seen a sample of the rows."""


@contextmanager
def shared_artifact(path: str, kind: str, meta: dict[str, Any], *, overwrite: bool = False) -> Iterator[Path]:
    """A temporary folder for all ranks, which becomes `path` when all have ended the block. Collective.

    Rank 0 makes it, writes the manifest from `meta` and renames it; where any rank raises, it is removed.

    Raises:
        InputError: `path` exists, and is not to be overwritten. On every rank.
    """
    names: list[Path | None] = [None]
    with agreed():
        if dist.get_rank() == 0:
            names = [artifact.begin(path, overwrite=overwrite)]
    dist.broadcast_object_list(names)
    tmp = names[0]
    assert tmp is not None
    try:
        yield tmp
        dist.barrier()
        if dist.get_rank() == 0:
            artifact.commit(tmp, path, kind, meta, overwrite=overwrite)
        dist.barrier()
    finally:
        if dist.get_rank() == 0:
            artifact.abort(tmp)


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

    def table(self, side: Literal["user", "item"], *, crossfit: bool = False) -> FactorTable:
        """(n, dim) float32, read by memory map."""
        return FactorTable(Path(self.path) / CROSSFIT if crossfit else Path(self.path), side)

    def counts(self, side: Literal["user", "item"], *, crossfit: bool = False) -> FactorTable:
        """(n, 1) float32, distinct pairs of each id, read by memory map."""
        folder = Path(self.path) / CROSSFIT if crossfit else Path(self.path)
        return FactorTable(folder, "user_count" if side == "user" else "item_count")


def open_factors(path: str, log: Log) -> FactorsArtifact:
    """Raises InputError where there are none at `path`, or they belong to another vocabulary."""
    manifest = artifact.read_manifest(path, FACTORS)
    check_vocabulary(path, manifest, log)
    return FactorsArtifact(path, manifest)
