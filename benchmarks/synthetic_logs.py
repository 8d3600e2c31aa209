"""Synthetic logs, ids and maps: narrow, wide, with lists, and long by hard links."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torchrec import KeyedJaggedTensor

from recpress.data.config import LayoutConfig, Schema
from recpress.data.dataset.writer import LogWriter
from recpress.modules.hashing.id_map import IdMap

PIECE = 1 << 18
CATEGORIES, FLOATS = 26, 13


@dataclass(frozen=True)
class SyntheticLog:
    """A log on disk: where, its schema, and which columns become the keys of the features."""

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


def narrow(folder: Path, rows: int, group: int | None = None, *, raw: str = "") -> SyntheticLog:
    """User, item, label and time, which is not read. With `group`, pyarrow's row groups of that size
    (zstd); otherwise our layout. `raw`: ids are keys of 64 bits, `integers`, or `text` of 16 digits."""

    def piece(rng: np.random.Generator, count: int) -> dict[str, np.ndarray]:
        return {
            "user_id": rng.integers(0, 1_000_000, count),
            "item_id": (rng.pareto(1.2, count) * 100).astype(np.int64) % 100_000,
            "label": rng.integers(1, 6, count).astype(np.float32),
            "time": rng.integers(0, 10**8, count),
        }

    def raw_piece(rng: np.random.Generator, count: int) -> dict[str, np.ndarray | pa.Array]:
        columns: dict[str, np.ndarray | pa.Array] = dict(piece(rng, count))
        for name in keys:
            numbers = np.asarray(columns[name]).astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
            columns[name] = numbers.view(np.int64)
            if raw == "text":
                columns[name] = pa.array([f"{number:016x}" for number in numbers.tolist()])
        return columns

    keys, hashed = ("user_id", "item_id"), ("user_id=1000000", "item_id=100000")
    size = _written(folder, rows, raw_piece if raw else piece, group)
    return SyntheticLog(str(folder), size, Schema(label="label", hashed=hashed if raw else ()), keys)


def wide(folder: Path, rows: int) -> SyntheticLog:
    """Criteo's shape: 26 categorical columns, 13 numbers, a label; each id column has its own vocabulary."""
    keys = tuple(f"C{number}" for number in range(1, CATEGORIES + 1))
    floats = tuple(f"I{number}" for number in range(1, FLOATS + 1))

    def piece(rng: np.random.Generator, count: int) -> dict[str, np.ndarray]:
        ids = {key: (rng.pareto(1.1, count) * 50).astype(np.int64) % 10 ** (2 + k % 5) for k, key in enumerate(keys)}
        numbers = {name: rng.normal(size=count).astype(np.float32) for name in floats}
        return {"label": (rng.random(count) < 0.25).astype(np.float32), **numbers, **ids}

    schema = Schema(user="", item="", label="label", categorical=keys, floats=floats)
    return SyntheticLog(str(folder), _written(folder, rows, piece), schema, keys, floats)


def with_lists(folder: Path, rows: int, mean: float = 9.5) -> SyntheticLog:
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
    return SyntheticLog(str(folder), _written(folder, rows, piece), schema, keys, lists=frozenset({"history"}))


def long(folder: Path, rows: int, file_rows: int = 4_000_000) -> SyntheticLog:
    """A narrow log of at least `rows` rows in our layout: one file under many names, by hard links.

    For every reader each name is a file with its own footer and row groups; only the first takes disk space.
    """
    log = narrow(folder, file_rows)
    files = list(log.files)
    for number in range(1, -(-rows // file_rows)):
        link = Path(files[0]).with_name(f"part-{number:05d}.parquet")
        os.link(files[0], link)
        files.append(str(link))
    return SyntheticLog(str(folder), tuple(files), log.schema, log.keys)


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


def skewed_ids(rng: np.random.Generator, num_ids: int, count: int) -> np.ndarray:
    """int64 (count,): id k about in proportion to 1 / (k + 1), as in a log."""
    return (num_ids ** rng.random(count) - 1).astype(np.int64).clip(0, num_ids - 1)


def random_ids(kind: str, num_ids: int, count: int, seed: int) -> torch.Tensor:
    """`uniform` ids; or `skewed` ones, with the frequent ones spread over all ids."""
    rng = np.random.default_rng(seed)
    if kind == "uniform":
        return torch.from_numpy(rng.integers(0, num_ids, count))
    return torch.from_numpy(np.random.default_rng(0).permutation(num_ids)[skewed_ids(rng, num_ids, count)])


def random_map(ids: int, rows: int, seed: int, rows_per_id: int = 1) -> IdMap:
    """Each id on random rows."""
    values = np.random.default_rng(seed).integers(0, rows, (ids, rows_per_id), dtype=np.int32)
    return IdMap(rows=torch.from_numpy(values), num_rows=rows)


def keyed(ids: torch.Tensor, keys: Sequence[str]) -> KeyedJaggedTensor:
    """One id per key and example: `ids` (keys x B,), by key; what is left over is dropped."""
    count = len(ids) // len(keys) * len(keys)
    lengths = torch.ones(count, dtype=torch.int32, device=ids.device)
    features = KeyedJaggedTensor([*keys], ids[:count], lengths=lengths, stride=count // len(keys))
    features.length_per_key()  # computed once per batch, whoever asks first
    return features
