"""Candidates from the nearest-neighbor index of an export. They are scored exactly afterwards; some may be missed."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from recpress.data.dataset import artifact
from recpress.data.errors import InputError

EXPORT = "export"
PACKAGES = {"faiss": "faiss-cpu", "usearch": "usearch"}


class ExportIndex:
    """The index of items in the folder of `recpress export`.

    Args:
        path: the export.
        model: manifest of the model, which must be the one that was exported.

    Raises:
        InputError: no export, one of another model or without an index; the library is not installed; the file cannot
            be read.
    """

    def __init__(self, path: str, model: dict[str, Any]) -> None:
        manifest = artifact.read_manifest(path, EXPORT)
        files = [(entry["name"], entry["fingerprint"]) for entry in model["contents"]]
        if manifest["model"]["fingerprint"] != hashlib.sha256(json.dumps(files).encode()).hexdigest()[:32]:
            raise InputError(f"{path}: an export of another model ({manifest['model']['path']})")
        if "index" not in manifest:
            raise InputError(f"{path}: has no index; expected an export with --index faiss or usearch")
        self.entry: dict[str, Any] = manifest["index"]
        self.library = str(self.entry["library"])
        if importlib.util.find_spec(self.library) is None:
            raise InputError(f"{path}: its index needs {self.library}: pip install {PACKAGES[self.library]}")
        artifact.check_inside(self.entry["file"], path)
        self.file = artifact.fetch(path, manifest, self.entry["file"]) / self.entry["file"]
        if not self.file.is_file():
            raise InputError(f"{self.file}: missing; expected the index of the export")
        known = {entry["name"]: entry["fingerprint"] for entry in manifest["contents"]}
        if artifact.fingerprint(self.file) != known.get(self.entry["file"]):
            raise InputError(f"{self.file}: changed since the export; expected the index that it wrote")
        self.nbytes = self.file.stat().st_size
        self._index: Any = None

    def open(self) -> None:
        """Read the index into memory. Raises InputError if it is corrupt."""
        try:
            self._index = _read(self.library, self.file)
        except (RuntimeError, ValueError, OSError) as error:
            raise InputError(f"{self.file}: not an index of {self.library}: {error}") from error
        for name, value in self.entry["effort"].items():
            setattr(self._index, name, value)

    def search(self, users: torch.Tensor, lengths: np.ndarray, seen: np.ndarray, k: int) -> list[np.ndarray]:
        """[number of candidates of each user, their ids, ascending]: about k items besides those that are omitted.

        Args:
            users: vectors (n, D) float32.
            lengths, seen: see `TopItems`.
        """
        num_items = self._index.ntotal if self.library == "faiss" else len(self._index)
        bounds = np.concatenate([[0], np.cumsum(lengths)])
        found: list[np.ndarray] = [np.empty(0, np.int64)] * len(users)
        rows, count = np.arange(len(users)), min(2 * k, num_items)
        while len(rows):
            ids = self._neighbors(users[rows], count)
            for row, of_row in zip(rows, ids, strict=True):
                omitted = seen[bounds[row] : bounds[row + 1]]
                found[row] = np.setdiff1d(of_row[of_row >= 0], omitted)  # -1: the index found no more
            if count == num_items:
                break
            rows = rows[[len(found[row]) < k for row in rows]]
            most = int(lengths[rows].max()) if len(rows) else 0
            if count >= k + most:
                break  # the searched part of the index has no more items
            count = min(k + most, num_items)
        return [np.array([len(ids) for ids in found], dtype=np.int64), np.concatenate([*found, np.empty(0, np.int64)])]

    def _neighbors(self, users: torch.Tensor, count: int) -> np.ndarray:
        """(n, count) int64."""
        dim = self._index.d if self.library == "faiss" else self._index.ndim
        queries = torch.nn.functional.pad(users.cpu(), (0, dim - users.shape[1])).numpy()
        if self.library == "faiss":
            return self._index.search(queries, count)[1]
        self._index.expansion_search = max(count, self.entry["effort"]["expansion_search"])
        found = self._index.search(queries, count)
        keys = np.asarray(found.keys).astype(np.int64).reshape(len(queries), -1)
        counts = np.asarray(getattr(found, "counts", np.full(len(queries), keys.shape[1]))).reshape(-1, 1)
        return np.where(np.arange(keys.shape[1]) < counts, keys, -1)


def _read(library: str, file: Path) -> Any:
    if library == "faiss":
        import faiss

        return faiss.read_index(str(file))
    from usearch.index import Index

    return Index.restore(str(file))
