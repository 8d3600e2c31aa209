"""`recpress hash --extend`: extends the maps of an earlier part of a log by its new ids."""

from __future__ import annotations

import contextlib
from typing import Any

import torch

from recpress.data.dataset import artifact, object_store
from recpress.data.dataset.log import Log
from recpress.data.errors import InputError
from recpress.modules.hashing.extend import extend_map, row_centers
from recpress.modules.hashing.id_map import IdMap
from recpress.modules.hashing.shared_rows import shared_rows
from recpress.modules.hashing.table_stats import TableStats
from recpress.modules.hashing.two_row import extend_two_row
from recpress.modules.row_source import RowSource
from recpress.trainer.artifacts.id_maps import open_maps


def extended_maps(path: str, log: Log, tables: list[TableStats]) -> list[IdMap]:
    """The maps at `path`, extended by the new ids of `tables`.

    Raises:
        InputError: no map of a table, or a map of another vocabulary than the one that the log extends.
    """
    before = open_maps(path, None)
    made = []
    for table in tables:
        old = before.map(table.name)
        _check_extends(path, log, table, old)
        if table.num_ids < old.num_ids:
            raise InputError(
                f"{path}: table {table.name!r} covers {old.num_ids} ids, and {log.path} has "
                f"{table.num_ids}; expected a log that extends the one it was made for"
            )
        source = table.embedding
        if source is None or table.num_ids == old.num_ids:
            made.append(extend_map(old, table.num_ids, vocabulary=table.vocabulary))
            continue
        before_ids, arrived = _Range(source, 0, old.num_ids), _Range(source, old.num_ids, table.num_ids)
        if old.rows_per_id == 2 and old.weights is not None:
            counts = None if table.counts is None else table.counts[: old.num_ids, None]
            centers = shared_rows(old, before_ids, counts, table.name)
            made.append(extend_two_row(old, table.num_ids, arrived, centers, vocabulary=table.vocabulary))
        elif old.rows_per_id == 1:
            centers = row_centers(old, before_ids, _head(table.counts, old.num_ids))
            made.append(extend_map(old, table.num_ids, centers=centers, embedding=arrived, vocabulary=table.vocabulary))
        else:
            made.append(extend_map(old, table.num_ids, vocabulary=table.vocabulary))
    return made


def _check_extends(path: str, log: Log, table: TableStats, old: IdMap) -> None:
    """Raise InputError if the log's vocabulary does not begin with that of the map."""
    manifest = log.manifest or {}
    if table.name not in manifest.get("vocabularies", {}) and table.name not in manifest.get("features", {}):
        return  # a log with dense ids has no vocabulary; only the number of ids can be compared
    extends = manifest.get("extends", {})
    parent = extends.get("vocabularies", {}).get(table.name)
    if extends and table.name in manifest.get("features", {}):
        with contextlib.suppress(OSError, InputError):  # the earlier log no longer exists, so it cannot be compared
            file = manifest["features"][table.name]["vocabulary"]
            parent = artifact.fingerprint(object_store.join(extends["log"], file))
    if old.vocabulary not in (None, table.vocabulary, parent):
        raise InputError(
            f"{path}: table {table.name!r} was made for another vocabulary than that which "
            f"{log.path} extends; the same ids mean others"
        )


class _Range:
    """Rows first to last - 1 of a source."""

    def __init__(self, source: RowSource, first: int, last: int) -> None:
        self._source, self._first = source, first
        self.shape = (last - first, source.shape[1])

    def __getitem__(self, index: Any) -> Any:
        rows, columns = index if isinstance(index, tuple) else (index, slice(None))
        start, stop, _ = rows.indices(self.shape[0])
        return self._source[self._first + start : self._first + stop, columns]


def _head(counts: torch.Tensor | None, number: int) -> torch.Tensor | None:
    return None if counts is None else counts[:number].clamp_min(0.1)
