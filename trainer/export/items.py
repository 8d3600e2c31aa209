"""Item vectors as Parquet, with raw ids."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from recpress.data.dataset.log import Log
from recpress.trainer.export.program import Program

FILE = "items.parquet"
BLOCK = 1 << 16
"""Items of a row group, whose vectors are computed together."""


def write_items(program: Program, log: Log, folder: Path) -> dict[str, Any]:
    """Write the vectors of all items in the order of their dense ids; the entry of the manifest.

    Columns: `raw` (if the log has raw ids), `id` (dense) and `vector`, a list of float32.
    """
    vocabulary = log.vocabulary("item")
    writer: pq.ParquetWriter | None = None
    dim = 0
    try:
        for first in range(0, log.num_items, BLOCK):
            ids = torch.arange(first, min(first + BLOCK, log.num_items))
            found = program.run(ids)
            dim = found.shape[1]
            columns = {"id": pa.array(ids.numpy()), "vector": _lists(found)}
            if vocabulary is not None:
                columns = {"raw": vocabulary.column("raw").slice(first, len(ids)), **columns}
            table = pa.table(columns)
            if writer is None:
                writer = pq.ParquetWriter(folder / FILE, table.schema, compression="zstd")
            writer.write_table(table)
    finally:
        if writer is not None:
            writer.close()
    return {"file": FILE, "items": log.num_items, "dim": dim, "columns": list(columns)}


def read_vectors(folder: Path) -> Iterator[torch.Tensor]:
    """The vectors of `write_items`, one row group at a time."""
    with pq.ParquetFile(folder / FILE) as file:
        for group in range(file.metadata.num_row_groups):
            column = file.read_row_group(group, columns=["vector"]).column(0).combine_chunks()
            values = np.array(column.values)
            yield torch.from_numpy(values.reshape(len(column), -1))


def _lists(vectors: torch.Tensor) -> pa.Array:
    return pa.FixedSizeListArray.from_arrays(pa.array(vectors.contiguous().view(-1).numpy()), vectors.shape[1])
