"""The artifact of `recpress hash`, with an id map per table, and the same maps inside a model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from recpress.data.dataset import artifact
from recpress.data.dataset.log import SIDES, Log, Side
from recpress.data.errors import InputError
from recpress.modules.hashing.id_map import IdMap
from recpress.trainer.artifacts.factors import check_vocabulary
from recpress.trainer.distributed.heartbeat import activity

HASH = "hash"
ROW_VECTORS = "row_vectors.npy"
"""In the folder of a table: vectors of its embedding rows, (num_rows, d) float32, if the stage wrote them."""


@dataclass(frozen=True)
class HashArtifact:
    """Id maps on disk, memory-mapped."""

    path: str
    folder: Path
    """`path`, or the local copy of a remote artifact."""
    manifest: dict[str, Any]
    maps: dict[str, IdMap]

    def map(self, table: str) -> IdMap:
        """The map of a table. Raises InputError if there is none."""
        if table not in self.maps:
            raise InputError(f"{self.path}: no map of the table {table!r}; it has {', '.join(sorted(self.maps))}")
        return self.maps[table]

    def rows(self, table: str) -> np.ndarray | None:
        """The vectors of the embedding rows of a table, (num_rows, d) float32, memory-mapped; None if there are none.

        Raises:
            InputError: the file is corrupt or of another shape or type.
        """
        path = self.folder / table / ROW_VECTORS
        if not path.exists():
            return None
        try:
            rows = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise InputError(f"{path}: not an array of row vectors: {error}") from error
        number = self.map(table).num_rows
        if rows.ndim != 2 or len(rows) != number or rows.dtype != np.float32:
            raise InputError(f"{path}: {rows.dtype} {rows.shape}, expected float32 ({number}, dimension)")
        return rows

    def describe(self) -> dict[str, Any]:
        """Entry of a manifest: path, and size and fingerprint of each file."""
        return {"path": self.path, "files": artifact.describe_folder(self.path)}


def open_maps(path: str, log: Log | None) -> HashArtifact:
    """The artifact at `path`. Checks its maps of users and items against the ids of `log`, if given.

    Raises:
        InputError: there is none; a map is corrupt, or made for another vocabulary.
    """
    manifest = artifact.read_manifest(path, HASH)
    if log is not None:
        check_vocabulary(path, manifest, log)
    with activity(f"fetching {path}"):
        folder = artifact.fetch(path, manifest)
    names = sorted(path.parent.name for path in folder.glob("*/map.json"))
    if not names:
        raise InputError(f"{path}: no map in it; expected a folder with a map.json for each table")
    return HashArtifact(path, folder, manifest, load_maps(folder, names, log))


def save_maps(maps: Mapping[str, IdMap], folder: str | Path) -> None:
    """Write each map to a folder with its name in `folder`."""
    for name, id_map in maps.items():
        target = Path(folder) / name
        target.mkdir(parents=True)
        id_map.save(target)


def load_maps(folder: str | Path, names: Iterable[str], log: Log | None) -> dict[str, IdMap]:
    """The maps of these tables that `save_maps` or `recpress hash` wrote to `folder`.

    Raises:
        InputError: a file is missing or corrupt; a map of users or items is for other ids than those of the log.
    """
    found = {}
    for name in names:
        source = Path(folder) / name
        try:
            found[name] = IdMap.load(source)
        except ValueError as error:
            raise InputError(str(error)) from error
        for side in SIDES:
            if log is not None and name == side:
                _check_ids(str(source), found[name], log, side)
    return found


def _check_ids(path: str, id_map: IdMap, log: Log, side: Side) -> None:
    ids, vocabulary = log.num_ids(side), log.vocabulary_fingerprint(side)
    if id_map.num_ids != ids:
        raise InputError(f"{path}: maps {id_map.num_ids} {side}s, but {log.path} has {ids}")
    if id_map.vocabulary not in (None, vocabulary):
        raise InputError(
            f"{path}: made for another {side} vocabulary than that of {log.path}: the same dense ids mean other {side}s"
        )
