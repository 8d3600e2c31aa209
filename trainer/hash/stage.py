"""`recpress hash`: id maps of tables to fewer embedding rows, learned from counts and an embedding."""

from __future__ import annotations

import logging
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist

from recpress.data.dataset.log import SIDES, Log
from recpress.data.errors import InputError
from recpress.modules.hashing.id_map import IdMap
from recpress.modules.hashing.methods import FROM_EMBEDDING, JOINT_METHODS, METHODS, build_map
from recpress.modules.hashing.shared_rows import shared_rows
from recpress.modules.hashing.table_stats import TableStats
from recpress.modules.row_source import check_source
from recpress.trainer.artifacts.factors import describe_log, open_factors, shared_artifact
from recpress.trainer.artifacts.id_maps import HASH, ROW_VECTORS
from recpress.trainer.config import chosen_schema
from recpress.trainer.distributed.collectives import gather_arrays
from recpress.trainer.distributed.heartbeat import activity
from recpress.trainer.distributed.process_group import Ranks, process_group
from recpress.trainer.distributed.rank_errors import raise_on_all_ranks
from recpress.trainer.evaluate.heldout import read_pairs
from recpress.trainer.hash.budget import budget, rows_of_tables
from recpress.trainer.hash.config import HashStageConfig
from recpress.trainer.hash.extend import extended_maps
from recpress.trainer.hash.tables import named, read_tables
from recpress.trainer.observability.progress import Progress
from recpress.trainer.open_log import describe_lost, open_on_all_ranks, share_lost
from recpress.trainer.report.numbers import format_bytes

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TableReport:
    """The map of one table."""

    name: str
    num_ids: int
    rows: int
    rows_per_id: int
    map_bytes: int
    unseen: int
    """Ids that do not occur in the log."""


@dataclass
class HashStageResult:
    """The maps of all tables."""

    tables: list[TableReport]
    seconds: float


def make_maps(config: HashStageConfig) -> HashStageResult:
    """Build the maps and write them to `config.out`. With torchrun, each rank builds those of some tables. Collective.

    Raises:
        InputError: the log, the factors, an embedding or the settings cannot be used; `out` exists. On every rank.
    """
    began = time.monotonic()
    with process_group("cpu") as ranks:
        skip, schema = config.on_bad_file == "skip", chosen_schema(config.schema)
        log = open_on_all_ranks(config.data, schema, skip=skip, pairs=not config.features)
        with raise_on_all_ranks():
            meta: dict[str, Any] = {"log": describe_log(log), "config": asdict(config)}
            if config.factors and not config.extend:
                meta["factors"] = open_factors(config.factors, log).fingerprint
        inputs = [config.data, config.factors, config.extend]
        with shared_artifact(config.out, HASH, meta, overwrite=config.overwrite, inputs=inputs) as tmp:
            reports = _Stage(config, log, tmp, ranks).run()
            meta["tables"] = {report.name: asdict(report) for report in reports}
            share_lost(log)
            meta |= describe_lost(log)
    result = HashStageResult(reports, time.monotonic() - began)
    if ranks.rank == 0:
        for report in reports:
            share = f"{100 * report.rows / report.num_ids:.3g} %"
            unseen = f"; {report.unseen:,} of the ids do not occur in the log" if report.unseen else ""
            size = format_bytes(report.map_bytes)
            print(f"{report.name}: {report.num_ids:,} ids -> {report.rows:,} rows ({share}), map {size}{unseen}")
        print(f"{config.out}: {config.method}, {result.seconds:.1f} s")
    return result


class _Stage:
    def __init__(self, config: HashStageConfig, log: Log, folder: Path, ranks: Ranks) -> None:
        self.config, self.log, self.folder, self.ranks = config, log, folder, ranks

    def run(self) -> list[TableReport]:
        """Build and save the maps; the reports of all tables, on every rank."""
        with raise_on_all_ranks():
            self._check()
        tables = read_tables(self.config, self.log)
        joint = self.config.method in JOINT_METHODS and not self.config.extend
        pairs = self._all_pairs() if joint else None
        mine: list[TableReport] = []
        with raise_on_all_ranks(), activity("building maps"):
            mine = self._joint(tables, pairs) if joint else self._own_tables(tables)
        parts: list[list[TableReport]] = [[] for _ in range(self.ranks.world_size)]
        dist.all_gather_object(parts, mine)
        made = {report.name: report for part in parts for report in part}
        return [made[table.name] for table in tables]

    def _check(self) -> None:
        config = self.config
        if config.extend:
            return
        if config.method in JOINT_METHODS and config.features:
            raise InputError(f"method {config.method!r}: expected users and items, not features")
        if config.method not in {**METHODS, **JOINT_METHODS}:
            raise InputError(f"method {config.method!r}: expected one of {', '.join([*METHODS, *JOINT_METHODS])}")
        if config.method not in FROM_EMBEDDING or config.factors or config.features:
            return
        if without := [side for side in SIDES if side not in named("embedding", config.embedding)]:
            raise InputError(
                f"table {without[0]!r}: method {config.method!r} needs an embedding of its ids; expected --factors, a "
                f"folder of `recpress factorize`, or --embedding {without[0]}=FILE"
            )

    def _all_pairs(self) -> tuple[np.ndarray, np.ndarray] | None:
        """All pairs of train on rank 0, None on other ranks. One rank reads each row group."""
        with raise_on_all_ranks():
            users, items = read_pairs(self.log, self.log.train)
        found = gather_arrays([users, items])
        if found is None:
            return None
        return np.concatenate([part[0] for part in found]), np.concatenate([part[1] for part in found])

    def _joint(self, tables: list[TableStats], pairs: tuple[np.ndarray, np.ndarray] | None) -> list[TableReport]:
        if pairs is None:
            return []
        users, items = tables
        made = JOINT_METHODS[self.config.method](users, items, *pairs, budget(self.config, tables), self.config)
        return [self._save(table, id_map) for table, id_map in zip(tables, made, strict=True)]

    def _own_tables(self, tables: list[TableStats]) -> list[TableReport]:
        """Maps of the tables of this rank; the largest tables are on different ranks."""
        config = self.config
        order = sorted(range(len(tables)), key=lambda index: -tables[index].num_ids)
        mine = [tables[index] for index in sorted(order[self.ranks.rank :: self.ranks.world_size])]
        if config.extend:
            maps = extended_maps(config.extend, self.log, mine)
            return [self._save(table, id_map) for table, id_map in zip(mine, maps, strict=True)]
        rows = dict(zip([table.name for table in tables], rows_of_tables(config, tables), strict=True))
        made = []
        for table in mine:
            number = rows[table.name]
            logger.info(f"{table.name}: {table.num_ids:,} ids onto {number:,} rows")
            with activity(f"building the map of {table.name}"), Progress(table.name, "id") as bar:
                id_map = build_map(replace(table, progress=bar.stage), number, config)
            made.append(self._save(table, id_map))
        return made

    def _save(self, table: TableStats, id_map: IdMap) -> TableReport:
        folder = self.folder / table.name
        folder.mkdir()
        id_map.save(folder)
        if table.embedding is not None and self.config.row_vectors:
            check_source(table.embedding, table.name, table.num_ids, table.embedding.shape[1])
            counts = None if table.counts is None else table.counts[:, None]
            vectors = shared_rows(id_map, table.embedding, counts, table.name)
            np.save(folder / ROW_VECTORS, vectors.numpy(), allow_pickle=False)
        unseen = 0 if table.counts is None else int((table.counts == 0).sum())
        return TableReport(table.name, table.num_ids, id_map.num_rows, id_map.rows_per_id, id_map.nbytes, unseen)
