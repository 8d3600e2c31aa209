"""Parquet files for the measurements of reading: narrow, wide, with lists, and long by hard links."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from recpress.data.config import LayoutConfig, Schema
from recpress.data.dataset.writer import LogWriter

PIECE = 1 << 18
CATEGORIES, FLOATS = 26, 13


@dataclass(frozen=True)
class Made:
    """A log that was made: where, what its columns mean, and what becomes the keys of the features."""

    folder: str
    files: tuple[str, ...]
    schema: Schema
    keys: tuple[str, ...]
    """Columns of ids, in the order of the KeyedJaggedTensor."""
    floats: tuple[str, ...] = ()
    lists: frozenset[str] = field(default_factory=frozenset)
    """Which of the keys are lists of ids."""
    label: str = "label"

    @property
    def columns(self) -> list[str]:
        """What a reader has to read."""
        return [*self.keys, *self.floats, self.label]

    @property
    def size(self) -> int:
        """Bytes of the files."""
        return sum(Path(file).stat().st_size for file in self.files)


def narrow(folder: Path, rows: int, group: int | None = None) -> Made:
    """User, item, label and time, which is not read. With `group` as pyarrow writes by default, zstd; else as ours."""

    def piece(rng: np.random.Generator, count: int) -> dict[str, np.ndarray]:
        return {
            "user_id": rng.integers(0, 1_000_000, count),
            "item_id": (rng.pareto(1.2, count) * 100).astype(np.int64) % 100_000,
            "label": rng.integers(1, 6, count).astype(np.float32),
            "time": rng.integers(0, 10**8, count),
        }

    return Made(str(folder), _written(folder, rows, piece, group), Schema(label="label"), ("user_id", "item_id"))


def wide(folder: Path, rows: int) -> Made:
    """Criteo's shape: 26 categorical columns, 13 numbers, a label; each id column with a vocabulary of its own."""
    keys = tuple(f"C{number}" for number in range(1, CATEGORIES + 1))
    floats = tuple(f"I{number}" for number in range(1, FLOATS + 1))

    def piece(rng: np.random.Generator, count: int) -> dict[str, np.ndarray]:
        ids = {key: (rng.pareto(1.1, count) * 50).astype(np.int64) % 10 ** (2 + k % 5) for k, key in enumerate(keys)}
        numbers = {name: rng.normal(size=count).astype(np.float32) for name in floats}
        return {"label": (rng.random(count) < 0.25).astype(np.float32), **numbers, **ids}

    schema = Schema(user="", item="", label="label", categorical=keys, floats=floats)
    return Made(str(folder), _written(folder, rows, piece), schema, keys, floats)


def with_lists(folder: Path, rows: int, mean: float = 9.5) -> Made:
    """User, item, label, and a list of items of `mean` length."""

    def piece(rng: np.random.Generator, count: int) -> dict[str, np.ndarray | pa.Array]:
        lengths = rng.poisson(mean, count)
        values = pa.array(rng.integers(0, 100_000, int(lengths.sum())))
        offsets = pa.array(np.concatenate(([0], np.cumsum(lengths))).astype(np.int32))
        return {
            "user_id": rng.integers(0, 1_000_000, count),
            "item_id": rng.integers(0, 100_000, count),
            "history": pa.ListArray.from_arrays(offsets, values),
            "label": np.ones(count, np.float32),
        }

    schema = Schema(label="label", categorical=("history",))
    keys = ("user_id", "item_id", "history")
    return Made(str(folder), _written(folder, rows, piece), schema, keys, lists=frozenset({"history"}))


def long(folder: Path, rows: int, file_rows: int = 4_000_000) -> Made:
    """A narrow log of at least `rows` rows in our layout: one real file under many names, by hard links.

    Each name is a file with a footer and row groups of its own for every reader, and only the first takes room.
    """
    made = narrow(folder, file_rows)
    files = list(made.files)
    for number in range(1, -(-rows // file_rows)):
        link = Path(files[0]).with_name(f"part-{number:05d}.parquet")
        os.link(files[0], link)
        files.append(str(link))
    return Made(str(folder), tuple(files), made.schema, made.keys)


Piece = Callable[[np.random.Generator, int], dict[str, np.ndarray | pa.Array]]


def _written(folder: Path, rows: int, piece: Piece, group: int | None = None) -> tuple[str, ...]:
    def tables() -> Iterator[pa.Table]:
        rng = np.random.default_rng(0)
        for first in range(0, rows, PIECE):
            yield pa.table(piece(rng, min(PIECE, rows - first)))

    folder.mkdir(parents=True, exist_ok=True)
    if group is None:
        with LogWriter(folder, LayoutConfig()) as writer:
            for table in tables():
                writer.part("train").write(table)
        return tuple(sorted(str(path) for path in (folder / "train").iterdir()))
    path = folder / "train.parquet"
    whole = pa.concat_tables(list(tables()))
    pq.write_table(whole, path, compression="zstd", row_group_size=group)
    return (str(path),)
