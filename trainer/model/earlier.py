"""Weights of an earlier run, read in parts: those of a model, or of a checkpoint of an unfinished run."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from recpress.data.dataset import artifact
from recpress.data.dataset.files import is_remote
from recpress.data.errors import InputError
from recpress.modules.hashing.id_map import IdMap
from recpress.trainer.artifacts.factors import MODEL
from recpress.trainer.checkpoint import dcp_storage
from recpress.trainer.checkpoint.backends import CHECKPOINT_NAME, KIND, RUN, VERSION
from recpress.trainer.distributed.heartbeat import activity
from recpress.trainer.model.two_tower import MAPS, WEIGHTS
from recpress.trainer.model.weights import Rectangle, is_table, load_dense, open_shard, shard_files

_STATE = "model/"
"""Prefix of the weights among the tensors of a checkpoint."""


@dataclass(frozen=True)
class SavedTable:
    """The rows of an embedding table, memory-mapped in rectangles."""

    name: str
    """As in `state_dict`."""
    parts: Sequence[tuple[Rectangle, np.ndarray]]

    @property
    def shape(self) -> tuple[int, int]:
        return max(rows[1] for (rows, _), _ in self.parts), max(columns[1] for (_, columns), _ in self.parts)

    def check(self) -> None:
        """Raise InputError if rectangles are missing."""
        rows, columns = self.shape
        if sum(array.size for _, array in self.parts) != rows * columns:
            raise InputError(f"{self.name}: shards of the table {(rows, columns)} are missing; the weights are damaged")

    def rows(self, ids: np.ndarray, columns: tuple[int, int]) -> torch.Tensor:
        """Rows `ids` (n,), each within the table, in these columns: (n, columns) float32. Reads nothing else."""
        found = np.empty((len(ids), columns[1] - columns[0]), dtype=np.float32)
        for ((first, last), (left, right)), array in self.parts:
            start, stop = max(left, columns[0]), min(right, columns[1])
            here = np.flatnonzero((ids >= first) & (ids < last)) if start < stop else ()
            if len(here):
                found[here, start - columns[0] : stop - columns[0]] = array[
                    ids[here] - first, start - left : stop - left
                ]
        return torch.from_numpy(found)


@dataclass(frozen=True)
class SavedWeights:
    """The weights at `path`, and the manifest of what they are weights of."""

    path: str
    manifest: dict[str, Any]
    dense: Mapping[str, torch.Tensor]
    """Name in `state_dict` -> the tensor."""
    tables: Mapping[str, SavedTable]
    """Name in `state_dict` -> trainable table."""
    maps: Path | None
    """Folder of the id maps; None in a checkpoint, which has none."""

    def id_map(self, name: str) -> IdMap | None:
        """The id map of this name; None if the weights have none. Raises InputError if it is damaged."""
        if self.maps is None or not (self.maps / name).is_dir():
            return None
        try:
            return IdMap.load(self.maps / name)
        except ValueError as error:
            raise InputError(str(error)) from error


def open_saved(path: str) -> SavedWeights:
    """The weights of the model at `path`, of a checkpoint there, or of its newest checkpoint. Not collective.

    Raises:
        InputError: there is neither; a file is missing or damaged.
    """
    checkpoint = _checkpoint(path)
    return _of_model(path) if checkpoint is None else _of_checkpoint(checkpoint)


def read_description(path: str) -> dict[str, Any]:
    """The manifest of `open_saved(path)`. Raises InputError likewise."""
    checkpoint = _checkpoint(path)
    if checkpoint is None:
        return artifact.read_manifest(path, MODEL)
    return artifact.parse_manifest(_bytes(checkpoint / artifact.MANIFEST), checkpoint, KIND, VERSION)


def _checkpoint(path: str) -> Path | None:
    """The folder of the checkpoint that `path` is or has; None if it is that of a model."""
    if is_remote(path):
        return None
    folder = Path(path)
    if CHECKPOINT_NAME.fullmatch(folder.name):
        return folder
    if (folder / artifact.MANIFEST).is_file() or not folder.is_dir():
        return None
    return _newest(folder)


def _newest(folder: Path) -> Path | None:
    """The newest complete checkpoint in a folder; None if there is none."""
    complete = (path.parent for path in folder.glob(f"step-*/{artifact.MANIFEST}"))
    steps = [path for path in complete if CHECKPOINT_NAME.fullmatch(path.name)]
    return max(steps, key=lambda path: int(path.name.partition("-")[2]), default=None)


def _of_model(path: str) -> SavedWeights:
    manifest = artifact.read_manifest(path, MODEL)
    with activity(f"fetching {path}"):
        folder = artifact.fetch(path, manifest, f"{WEIGHTS}/*", f"{MAPS}/*")
    tables = {}
    for place in sorted((folder / WEIGHTS / "tables").glob("*")):
        if not place.name.endswith(".frozen"):
            parts = [(rectangle, open_shard(file, rectangle)) for rectangle, file in shard_files(place)]
            tables[place.name] = SavedTable(place.name, parts)
    return SavedWeights(path, manifest, load_dense(folder / WEIGHTS), tables, folder / MAPS)


def _of_checkpoint(folder: Path) -> SavedWeights:
    """With the best weights so far, if the run chose some, as a finished run publishes them."""
    manifest = read_description(str(folder))
    try:
        best = json.loads(_bytes(folder / RUN)).get("best_step")
        source = folder if best is None else folder.parent / f"best-{best:08d}"
        tensors = dcp_storage.open_tensors(source)
    except (ValueError, OSError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{folder}: not a complete checkpoint ({error})") from error
    dense, tables = {}, {}
    for name, parts in tensors.items():
        if not name.startswith(_STATE):
            continue
        name = name.removeprefix(_STATE)
        if is_table(name) or (".embeddings." in name and name.endswith(".weight")):  # of an EmbeddingCollection
            rectangles = [(_rectangle(offsets, array), array) for offsets, array in parts]
            tables[name] = SavedTable(name, rectangles)
        elif len(parts) == 1:
            dense[name] = torch.from_numpy(np.array(parts[0][1]))
    return SavedWeights(str(folder), manifest, dense, tables, None)


def _rectangle(offsets: Iterable[int], array: np.ndarray) -> Rectangle:
    (row, column), (height, width) = offsets, array.shape
    return (row, row + height), (column, column + width)


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; expected the folder of a model or of a checkpoint") from error
