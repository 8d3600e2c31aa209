"""Writes the files of a log, with row groups and files of a given size, in bounded memory."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from recpress.data.config import LayoutConfig, Schema
from recpress.data.dataset import artifact
from recpress.data.dataset.files import first_line
from recpress.data.errors import InputError


class LogWriter:
    """Writes the parts of a log into a folder of `artifact.writing`, and then gives its manifest."""

    def __init__(self, folder: Path, layout: LayoutConfig) -> None:
        if layout.rows_per_file < 1 or layout.row_group_rows < 1:
            raise InputError(f"{layout}: expected at least 1 row per file and per row group")
        self.folder = folder
        self.layout = layout
        self._parts: dict[str, PartWriter] = {}
        self._tables: list[str] = []

    def part(self, name: str) -> PartWriter:
        """The writer of `train`, `val`, `test` or `test_negatives`; its files are created with its first row."""
        if name not in self._parts:
            self._parts[name] = PartWriter(self.folder / name, self.layout)
        return self._parts[name]

    def table(self, name: str, table: pa.Table) -> None:
        """Write one complete table: a vocabulary or a side table."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, path, compression="zstd", row_group_size=1 << 20)
        self._tables.append(name)

    def close(self) -> dict[str, int]:
        """Finishes all files. Returns the rows of each part."""
        for part in self._parts.values():
            part.close()
        return {name: part.rows for name, part in self._parts.items()}

    def manifest(self, schema: Schema, num_users: int, num_items: int, **more: Any) -> dict[str, Any]:
        """The manifest that `log.open_log` reads: schema, sizes, rows, files with sizes and fingerprints. Closes the
        writer."""
        rows = self.close()
        names = [f"{name}/{file}" for name in self._parts for file in sorted(os.listdir(self.folder / name))]
        return {
            "schema": asdict(schema),
            "num_users": num_users,
            "num_items": num_items,
            "rows": rows,
            "files": [artifact.describe_file(self.folder / name, name) for name in names + self._tables],
            **more,
        }

    def __enter__(self) -> LogWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class PartWriter:
    """Collects rows until a row group is full; `part-00000.parquet` and so on under its folder."""

    def __init__(self, folder: Path, layout: LayoutConfig) -> None:
        self.rows = 0
        self._folder = folder
        self._layout = layout
        self._waiting: list[pa.Table] = []
        self._num_waiting = 0
        self._writer: pq.ParquetWriter | None = None
        self._files = 0
        self._rows_in_file = 0

    def write(self, table: pa.Table) -> None:
        """Add rows; all calls must have the same columns and types."""
        self.rows += table.num_rows
        self._waiting.append(table)
        self._num_waiting += table.num_rows
        if self._num_waiting >= self._layout.row_group_rows:
            self._flush(self._layout.row_group_rows)

    def close(self) -> None:
        if self._waiting:
            self._flush(1)
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _flush(self, at_least: int) -> None:
        """Writes row groups until fewer than `at_least` rows wait."""
        table = pa.concat_tables(self._waiting)
        start = 0
        while table.num_rows - start >= at_least:
            if self._writer is None:
                self._open(table.schema)
            assert self._writer is not None
            room = self._layout.rows_per_file - self._rows_in_file
            size = min(self._layout.row_group_rows, room, table.num_rows - start)
            try:
                self._writer.write_table(table.slice(start, size), row_group_size=size)
            except OSError as error:
                raise InputError(f"{self._folder}: cannot be written: {first_line(error)}") from error
            start += size
            self._rows_in_file += size
            if self._rows_in_file == self._layout.rows_per_file:
                self._writer.close()
                self._writer = None
        rest = table.slice(start)
        self._waiting = [rest] if rest.num_rows else []
        self._num_waiting = rest.num_rows

    def _open(self, schema: pa.Schema) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        # Ids and times decode about twice as fast from delta-packed integers as from a dictionary, and are
        # smaller.
        delta = {field.name: "DELTA_BINARY_PACKED" for field in schema if pa.types.is_integer(field.type)}
        self._writer = pq.ParquetWriter(
            self._folder / f"part-{self._files:05d}.parquet",
            schema,
            compression="zstd",
            use_dictionary=[
                field.name for field in schema if field.name not in delta and not pa.types.is_nested(field.type)
            ],
            column_encoding=delta or None,
        )
        self._files += 1
        self._rows_in_file = 0
