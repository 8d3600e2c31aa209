"""Upper bound of the host memory of a stream, from row counts and footers alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from recpress.data.dataset.column_chunks import leaves
from recpress.data.dataset.hashed_ids import raw_kind
from recpress.data.dataset.parquet_split import ParquetSplit
from recpress.data.stream.order import TILE_ROWS
from recpress.data.stream.read_plan import ReadPlan

_PAGE = 1 << 20
"""Bytes of a page of a column chunk, as writers make them."""
# Measured, as are the three after it: docs/how/stream.md has the peaks.
KEPT = 16 << 20
"""Permutations, addresses, and what libraries keep from their first use on."""
_THREAD = 12 << 20
"""What the allocators keep for a thread that decodes and the one that writes for it."""
_ROUNDED = 1.35
"""What allocators take for the columns of row groups, over what they are asked for: most where these are many."""
_SCATTERED = 2
"""The same for parts of lists, which come and go in all sizes."""
_PIPELINE = 3
"""Batches that training itself holds."""


def memory_bound(
    rows: ParquetSplit,
    columns: Sequence[str],
    plan: ReadPlan,
    *,
    rank_rows: int,
    batch_rows: int,
    threads: int,
    prefetch_batches: int,
) -> int:
    """Bytes: windows x rows of a window x bytes per row + threads x a row group while it is decoded + (threads + 1) x a
    row group to be written + staged tiles + lists while they are put in order + batches.

    Args:
        rank_rows: rows of a shuffle window on this rank.
        batch_rows: rows of a batch on this rank.
        prefetch_batches: batches that wait for training.
    """
    lists = [name for name in columns if pa.types.is_nested(_type(rows, name))]
    dense = sum(_width(rows, name) for name in columns if name not in lists)
    values = sum(values_per_row(rows, name) for name in lists)
    row = dense + _SCATTERED * 8 * (values + 2 * len(lists))  # values, offsets, and the place of a row in the window
    floats = 4 * sum(rows.columns[name].role == "float" for name in columns)
    decoding = max((_decoding(rows, read.group, columns) for read in plan.reads), default=0)
    written = plan.largest * row  # one lies between the threads that decode and those that write
    staged = plan.lanes * min(TILE_ROWS, rank_rows) * dense
    ordered = rank_rows * 8 * (values + 8 * len(lists))  # of one window: in file order and in batch order
    batches = (prefetch_batches + _PIPELINE) * batch_rows * (floats + 8 * (values + 2 * len(lists)))
    windows = (plan.most_windows() + 1) * rank_rows * row  # training still holds batches of the one before
    groups = _ROUNDED * (threads * decoding + (threads + 1) * written)
    return round(windows + groups + staged + ordered + batches + KEPT + threads * _THREAD)


def _type(rows: ParquetSplit, name: str) -> pa.DataType:
    first = rows.files[rows.groups[0].file]  # a skipped file has no footer
    return first.schema.field(name).type


def _width(rows: ParquetSplit, name: str) -> int:
    """Bytes of a value of a dense column, in a shuffle window."""
    return 4 if rows.columns[name].role in ("label", "float") else 8


def values_per_row(rows: ParquetSplit, name: str) -> float:
    """Mean length of a column of lists."""
    values = sum(chunk.num_values for group in rows.groups for chunk in _chunks(rows, group.file, group.group, name))
    return values / rows.num_rows


def _decoding(rows: ParquetSplit, group: int, columns: Sequence[str]) -> int:
    """Of one row group: the bytes of its column chunks, a page and a dictionary of each, and what they are decoded and
    converted to. Values of lists are decoded to memory that doubles; the old one is there while the new one fills."""
    place, total = rows.groups[group], 0
    schema = rows.files[place.file].schema
    for name in columns:
        kind = schema.field(name).type
        nested = pa.types.is_nested(kind)
        value = kind.value_type if nested else kind
        wanted = 8 if nested else _width(rows, name)
        for chunk in _chunks(rows, place.file, place.group, name):
            width = max(1, _bits(value, chunk) // 8)
            grown = 3 << (chunk.num_values - 1).bit_length() >> 1 if nested else chunk.num_values
            converted = 0 if width == wanted and not rows.columns[name].hashed else wanted
            total += grown * width + chunk.num_values * converted + chunk.total_compressed_size
            total += 2 * min(_PAGE, chunk.total_uncompressed_size)
    return total


def _bits(kind: pa.DataType, chunk: Any) -> int:
    """Of a decoded value; of text the mean of a column chunk, with its offset, or its place in a dictionary."""
    if raw_kind(kind) != "text":
        return int(kind.bit_width)
    return 8 * (4 + -(-chunk.total_uncompressed_size // max(1, chunk.num_values)))


def _chunks(rows: ParquetSplit, file: int, group: int, name: str) -> list[Any]:
    if name in rows.files[file].constants:
        return []
    metadata = rows.files[file].metadata
    return [metadata.row_group(group).column(place) for place in leaves(metadata, [name])]
