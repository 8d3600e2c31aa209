"""Vocabularies for serving: raw id -> dense id, as Parquet."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from recpress.data.dataset.log import SIDES, Log
from recpress.data.dataset.parquet_split import read_whole
from recpress.trainer.export import hash_ids

FOLDER = "vocabulary"


def write_vocabularies(log: Log, folder: Path) -> dict[str, Any]:
    """Write the vocabularies of the log's ids and features; their entries of the manifest, by column.

    Each has the columns `raw` and `id`. A column without an entry is hashed, or has dense ids already.
    """
    found: dict[str, Any] = {}
    for side in SIDES:
        column = log.column(side)
        if column and (table := log.vocabulary(side)) is not None:
            entry = _write(folder, side, table)
            found[column] = {**entry, "side": side, "fingerprint": log.vocabulary_fingerprint(side)}
    for column, known in ((log.manifest or {}).get("features") or {}).items():
        if name := known.get("vocabulary"):
            number = len(found)  # a column may have any name, of another vocabulary or with a slash
            table = read_whole(log.filesystem, f"{log.root}/{name}")
            found[column] = _write(folder, f"feature-{number}", table)
    return found


def write_hash(log: Log, folder: Path) -> dict[str, Any]:
    """Write the hash function, if columns of the log are hashed while it is read; their entries of the manifest."""
    found: dict[str, Any] = {}
    for column in log.train.columns:
        if (hashed := log.hash_of(column)) is not None:
            found[column] = {"kind": hashed[0], "ids": hashed[1]}
    if found:
        (folder / "hash_ids.py").write_bytes(Path(hash_ids.__file__).read_bytes())
    return found


def _write(folder: Path, name: str, vocabulary: pa.Table) -> dict[str, Any]:
    raw = vocabulary.column("raw")
    ids = pa.array(np.arange(len(raw), dtype=np.int64))
    path = folder / FOLDER / f"{name}.parquet"
    path.parent.mkdir(exist_ok=True)
    pq.write_table(pa.table({"raw": raw, "id": ids}), path)
    return {"file": f"{FOLDER}/{name}.parquet", "ids": len(raw), "raw": str(raw.type)}
