"""What a stream takes of a rank's host memory, from row counts and footers alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyarrow as pa
from recpress.data.order import TILE_ROWS
from recpress.data.read_ahead import Ahead
from recpress.data.rows import Rows

_PAGE = 1 << 20
"""Bytes of a page of a column chunk, as writers make them."""
KEPT = 16 << 20
"""Permutations, addresses, and what the allocators keep of what was freed."""
_PIPELINE = 3
"""Batches that training itself holds."""


def memory_bound(
    rows: Rows,
    columns: Sequence[str],
    ahead: Ahead,
    *,
    rank_rows: int,
    batch_rows: int,
    threads: int,
    ready: int,
) -> int:
    """(rounds + 1) x rows of a round x bytes a row + threads x a row group while it is decoded and while it is written
    + tiles + batches.

    Args:
        rank_rows: rows of a round on this rank.
        batch_rows: rows of a batch on this rank.
    """
    row = sum(_bytes_a_row(rows, name) for name in columns)
    floats = 4 * sum(rows.columns[name].role == "float" for name in columns)
    decoding = max((_decoding(rows, visit.group, columns) for visit in ahead.visits), default=0)
    decoding *= 2  # allocators keep what one thread allocated and another freed
    written = (2 * threads + 1) * ahead.largest * row  # one lies between those that decode and those that write
    begun = ahead.lanes * min(TILE_ROWS, rank_rows) * row
    batches = (ready + _PIPELINE) * batch_rows * floats
    rounds = (ahead.most_rounds() + 1) * rank_rows * row
    return round(rounds + threads * decoding + written + begun + batches + KEPT)


def _bytes_a_row(rows: Rows, name: str) -> float:
    """Of a column in a round."""
    first = rows.files[rows.groups[0].file]  # a file that was left out has no footer
    kind = first.metadata.schema.to_arrow_schema().field(name).type
    if not pa.types.is_nested(kind):
        return 4 if rows.columns[name].role in ("label", "float") else 8
    values = sum(chunk.num_values for group in rows.groups for chunk in _chunks(rows, group.file, group.group, name))
    return 3 * 8 * (values / rows.num_rows + 1)  # the parts, their order, and the round


def _decoding(rows: Rows, group: int, columns: Sequence[str]) -> int:
    """Of one row group: the bytes of its column chunks, two pages, what they are decoded to
    (twice: while it grows) and converted to."""
    place, total = rows.groups[group], 0
    schema = rows.files[place.file].metadata.schema.to_arrow_schema()
    for name in columns:
        kind, role = schema.field(name).type, rows.columns[name].role
        value = kind.value_type if pa.types.is_nested(kind) else kind
        width = max(1, value.bit_width // 8)
        wanted = 4 if role in ("label", "float") else 8
        for chunk in _chunks(rows, place.file, place.group, name):
            converted = 0 if width == wanted else wanted
            total += chunk.num_values * (2 * width + converted) + chunk.total_compressed_size
            total += 2 * min(_PAGE, chunk.total_uncompressed_size)  # dictionary and data
    return total


def _chunks(rows: Rows, file: int, group: int, name: str) -> list[Any]:
    found = (
        rows.files[file].metadata.row_group(group).column(place)
        for place in range(rows.files[file].metadata.num_columns)
    )
    return [chunk for chunk in found if chunk.path_in_schema == name or chunk.path_in_schema.startswith(f"{name}.")]
