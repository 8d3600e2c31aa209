"""Columns of a log whose raw ids are hashed while they are read: `Schema.hashed` against the files of the log."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from recpress.data.config import Schema
from recpress.data.dataset.parquet_split import ParquetSplit
from recpress.data.dataset.schema import check_raw_kinds
from recpress.data.errors import InputError


def hash_sizes(path: str, schema: Schema, manifest: dict[str, Any] | None) -> dict[str, int]:
    """`Schema.hash_sizes`. Raises InputError if a column has a vocabulary, which numbers its ids already."""
    sizes = schema.hash_sizes
    known = {schema.user: "user", schema.item: "item"}
    numbered = set((manifest or {}).get("vocabularies", {})) | set((manifest or {}).get("features", {}))
    for name in sizes:
        if name in numbered or known.get(name) in numbered:
            raise InputError(f"schema.hashed: {path} has a vocabulary for '{name}', which numbers its ids already")
    return sizes


def check_hashed(
    opened: Mapping[str, ParquetSplit], schema: Schema, negatives: Schema, hashed: Mapping[str, int]
) -> None:
    """Raise InputError if a hashed column is integers in one part and text in another.

    Args:
        opened: parts of the log by name.
        negatives: names of the columns of `test_negatives`, besides the list `negatives`.
    """
    own = {negatives.user: schema.user, negatives.item: schema.item, "negatives": schema.item}
    for name in hashed:
        kinds = []
        for part, rows in opened.items():
            there = [key for key, value in own.items() if value == name] if part == "test_negatives" else [name]
            first = next(place for place, file in enumerate(rows.files) if file.metadata)
            types = rows.files[first].schema
            kinds += [(rows.where_file(first), types.field(key).type) for key in there if key in rows.columns]
        check_raw_kinds(name, kinds)
