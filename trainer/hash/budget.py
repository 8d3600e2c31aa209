"""The budget of rows of `recpress hash`, and how the tables share it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from recpress.data.errors import InputError
from recpress.modules.hashing.budget import split_by_ids, split_rows
from recpress.modules.hashing.methods import FROM_EMBEDDING
from recpress.modules.hashing.table_stats import TableStats, require_embedding
from recpress.modules.row_source import LARGEST, RowSource, blocks
from recpress.trainer.hash.config import HashStageConfig
from recpress.trainer.hash.tables import named


def budget(config: HashStageConfig, tables: list[TableStats]) -> int:
    """Rows of all tables together. Raises InputError if they are fewer than the tables, or more than the ids."""
    ids = sum(table.num_ids for table in tables)
    rows = config.rows or round(config.share * ids)
    if config.bytes:
        widths = {table.embedding.shape[1] for table in tables if table.embedding is not None}
        if len(widths) != 1:
            raise InputError("bytes: expected embeddings of one dimension, which determines the size of a row")
        rows = int(config.bytes // (4 * widths.pop()))
    if not len(tables) <= rows <= ids:
        raise InputError(f"a budget of {rows:,} rows: expected {len(tables)} to {ids:,}, the ids of all tables")
    return rows


def rows_of_tables(config: HashStageConfig, tables: list[TableStats]) -> list[int]:
    """Rows of each table. Raises InputError if `table_rows` does not fit the tables or the budget."""
    total = budget(config, tables)
    fixed = {name: _number(name, text) for name, text in named("table_rows", config.table_rows).items()}
    names = [table.name for table in tables]
    unknown = [name for name in fixed if name not in names]
    if unknown:
        raise InputError(f"table_rows: no table {unknown[0]!r}; tables are {', '.join(names)}")
    rest = [table for table in tables if table.name not in fixed]
    left = total - sum(fixed.values())
    if rest and left < len(rest):
        raise InputError(f"table_rows: {sum(fixed.values()):,} rows of a budget of {total:,} leave too few")
    learned = config.method in FROM_EMBEDDING
    for table in tables if learned else ():
        require_embedding(table, config.method)
    if learned and config.split == "distortion" and len(rest) > 1:
        shares = split_rows(_comparable(config, rest), min(left, sum(t.num_ids for t in rest)), config)
    else:
        shares = split_by_ids([table.num_ids for table in rest], left)
    found = fixed | {table.name: rows for table, rows in zip(rest, shares, strict=True)}
    return [found[name] for name in names]


def _comparable(config: HashStageConfig, tables: list[TableStats]) -> list[TableStats]:
    """Users and items, scaled so that equal distortions change scores equally. Warm-ups already have this scale."""
    if config.features or len(tables) != 2:
        return tables
    grams = []
    for table in tables:
        assert table.embedding is not None
        rows, dim = table.embedding.shape
        gram = torch.zeros(dim, dim, dtype=torch.float64)
        for _, block in blocks(table.embedding, table.name, (0, rows), (0, dim), largest=LARGEST):
            gram += (block.T @ block).double()
        grams.append(gram)
    if grams[0].shape != grams[1].shape:
        return tables
    return [
        replace(table, embedding=_Turned(table.embedding, root(gram)))  # type: ignore[arg-type]
        for table, gram in zip(tables, reversed(grams), strict=True)
    ]


def _number(name: str, text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise InputError(f"table_rows: {name}={text}, expected a number of rows, 1 or more")
    return int(text)


def root(matrix: torch.Tensor) -> torch.Tensor:
    """The symmetric square root of a positive semidefinite matrix, float32."""
    values, vectors = torch.linalg.eigh(matrix.double())
    return ((vectors * values.clamp_min(0).sqrt()) @ vectors.T).float()


class _Turned:
    """A source whose rows are multiplied by a matrix."""

    def __init__(self, source: RowSource, matrix: torch.Tensor) -> None:
        self._source, self._matrix = source, matrix
        self.shape = (source.shape[0], matrix.shape[1])

    def __getitem__(self, index: Any) -> torch.Tensor:
        rows, columns = index if isinstance(index, tuple) else (index, slice(None))
        found = self._source[rows]
        found = found if isinstance(found, torch.Tensor) else torch.from_numpy(np.array(found, np.float32))
        return (found.float() @ self._matrix)[:, columns]
