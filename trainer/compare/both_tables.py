"""How `compare both` stores the id tables at a level of bytes, and what distortion that costs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch

from recpress.data.dataset.log import SIDES, Log
from recpress.data.errors import InputError
from recpress.modules.frozen.collection import FrozenEmbeddingBagCollection
from recpress.modules.frozen.kernel import FrozenTable, Storage, row_bytes
from recpress.modules.hashing.map_matrix import MapMatrix
from recpress.modules.row_source import round_up
from recpress.trainer.artifacts.factors import FactorsArtifact
from recpress.trainer.artifacts.id_maps import open_maps
from recpress.trainer.compare.config import CompareBothConfig
from recpress.trainer.compare.resume import is_complete
from recpress.trainer.compare.setup import quiet
from recpress.trainer.hash.budget import root
from recpress.trainer.hash.config import HashStageConfig
from recpress.trainer.hash.stage import make_maps

STORAGES: tuple[Storage, ...] = ("fp32", "fp16", "int8", "int4")
_BITS = {"fp32": "32-bit", "fp16": "16-bit", "int8": "8-bit", "int4": "4-bit"}
_MAP_BYTES = 8
"""Per id, about: two row numbers and two weights."""


@dataclass(frozen=True, kw_only=True)
class Form:
    """How the id tables are stored at one level of bytes."""

    level: float
    """Bytes aimed at, as a share of those of the full tables in float32."""
    storage: Storage
    hash: str | None
    """Folder of the maps; None: one row per id."""
    rows: int
    bytes: int
    """Rows as stored and maps, bit-packed."""
    serving_map_bytes: int
    """Of the maps as `LearnedHash` serves them: int32 row numbers and weights."""
    map_bytes: int
    """Of the maps, bit-packed."""
    error: float
    """Weighted distortion of the vectors, in units of scores, as a share of their weighted squares."""
    vectors: tuple[torch.Tensor, torch.Tensor]
    """Decoded vectors of users and of items, (ids, d)."""

    def words(self, ids: int) -> str:
        """`8-bit rows, 78 % of the ids`."""
        bits = _BITS[self.storage]
        return f"{bits} rows, one per id" if self.hash is None else f"{bits} rows, {self.rows / ids:.0%} of the ids"


class FullTables:
    """The factors of one factorization, from which the forms of all levels are made.

    Args:
        path: of the log.
    """

    def __init__(self, config: CompareBothConfig, path: str, log: Log, factors: FactorsArtifact) -> None:
        self.config, self.path, self.log, self.factors = config, path, log, factors
        self.ids = log.num_users + log.num_items
        self.tables = [torch.from_numpy(factors.table(side)[0 : log.num_ids(side)]) for side in SIDES]
        self.counts = [torch.from_numpy(factors.counts(side)[0 : log.num_ids(side)])[:, 0] for side in SIDES]
        # an error of a vector counts by what it does to the scores with all vectors of the other side
        self.scales = [root(other.T @ other) for other in reversed(self.tables)]

    def best_form(self, level: float, folder: str, seed: int) -> Form:
        """The storage, and with it the number of rows, with the least distortion at a level of bytes. Collective.

        Args:
            folder: prefix of the folders of maps.

        Raises:
            InputError: the level does not hold the maps.
        """
        dim = round_up(self.factors.dim)
        limit = level * 4 * dim * self.ids
        candidates = []
        for storage in STORAGES:
            size = row_bytes(storage, dim)
            if size * self.ids <= limit * 1.0001:
                candidates.append(self._form(level, storage, None))
                break  # one row per id, in the most bits that the level holds
            rows = int((limit - _MAP_BYTES * self.ids) // size)
            if storage in ("int8", "int4") and rows >= 2:
                path = f"{folder}-{storage}"
                if not is_complete(path):
                    with quiet():
                        make_maps(
                            HashStageConfig(
                                data=self.path,
                                out=path,
                                factors=self.factors.path,
                                schema=self.config.schema,
                                rows=rows,
                                method="learned",
                                rows_per_id=2,
                                count_exponent=self.config.count_exponent,
                                seed=seed,
                            )
                        )
                candidates.append(self._form(level, storage, path))
        if not candidates:
            raise InputError(f"levels: {level} of the full tables' bytes does not hold the maps; expected more")
        return min(candidates, key=lambda form: form.error)

    def _form(self, level: float, storage: Storage, path: str | None) -> Form:
        hashed = None if path is None else open_maps(path, self.log)
        each = row_bytes(storage, round_up(self.factors.dim))
        vectors, rows, map_bytes, serving, lost, weight = [], 0, 0, 0, 0.0, 0.0
        for side, table, count, scale in zip(SIDES, self.tables, self.counts, self.scales, strict=True):
            if hashed is None:
                decoded = decode(table, storage)
                rows += len(table)
            else:
                id_map, source = hashed.map(side), hashed.rows(side)
                assert source is not None
                stored = decode(torch.from_numpy(np.array(source[0 : id_map.num_rows])), storage)
                decoded = MapMatrix(id_map).expand(stored)
                rows += id_map.num_rows
                map_bytes += id_map.nbytes
                serving += id_map.rows.nbytes + (0 if id_map.weights is None else id_map.weights.nbytes)
            w = count.double().clamp_min(0.1) ** self.config.count_exponent
            lost += float(((((decoded - table) @ scale).square().sum(1)) * w).sum())
            weight += float((((table @ scale).square().sum(1)) * w).sum())
            vectors.append(decoded)
        return Form(
            level=level,
            storage=storage,
            hash=path,
            rows=rows,
            bytes=rows * each + map_bytes,
            map_bytes=map_bytes,
            serving_map_bytes=serving,
            error=lost / weight if weight else 0.0 if not lost else math.inf,
            vectors=cast(tuple[torch.Tensor, torch.Tensor], tuple(vectors)),
        )


def decode(table: torch.Tensor, storage: Storage) -> torch.Tensor:
    """Vectors (n, d) float32 as a frozen table of this storage returns them."""
    dim = round_up(table.shape[1])
    frozen = FrozenEmbeddingBagCollection(
        [FrozenTable(name="t", rows=len(table), dim=dim, features=("t",), storage=storage)]
    )
    frozen.load("t", table)
    ((_, decoded),) = frozen.decoded("t")
    return decoded[:, : table.shape[1]].clone()
