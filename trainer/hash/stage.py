"""The stage `recpress hash`: maps from the ids of tables to fewer rows, learned from counts and an embedding."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from recpress.data.errors import InputError
from recpress.data.log import Log
from recpress.modules.hashing.id_map import IdMap
from recpress.modules.hashing.methods import JOINT_METHODS, METHODS, build_map
from recpress.modules.hashing.problem import IdTable, Progress
from recpress.modules.rows import check_source
from recpress.modules.shared_rows import shared_rows
from recpress.trainer.artifacts import describe_log, shared_artifact
from recpress.trainer.config import chosen_schema
from recpress.trainer.distributed.process_group import agreed, process_group
from recpress.trainer.evaluate.heldout import read_pairs
from recpress.trainer.hash.budget import budget, rows_of_tables
from recpress.trainer.hash.config import HashStageConfig
from recpress.trainer.hash.extend import extended_maps
from recpress.trainer.hash.id_maps import HASH, ROW_VECTORS
from recpress.trainer.hash.tables import read_tables
from recpress.trainer.logs.damaged import describe_lost, open_on_all_ranks, share_lost
from recpress.trainer.report.results import format_bytes
from tqdm import tqdm


@dataclass(frozen=True)
class TableReport:
    """What became of one table."""

    name: str
    num_ids: int
    rows: int
    ways: int
    map_bytes: int
    unseen: int
    """Ids that the log never has."""


@dataclass
class HashStageResult:
    """What the stage made."""

    tables: list[TableReport]
    seconds: float


def make_maps(config: HashStageConfig) -> HashStageResult:
    """Make the maps and write them to `config.out`; with torchrun, rank 0 does it. Collective.

    Raises:
        InputError: the log, the factors, an embedding or the settings cannot be used; `out` exists. On every rank.
    """
    began = time.monotonic()
    with process_group("cpu") as ranks:
        skip, schema = config.on_bad_file == "skip", chosen_schema(config.schema)
        log = open_on_all_ranks(config.data, schema, skip=skip, pairs=not config.features)
        with agreed():
            meta: dict[str, Any] = {"log": describe_log(log), "config": asdict(config)}
        inputs = [config.data, config.factors, config.extend]
        with shared_artifact(config.out, HASH, meta, overwrite=config.overwrite, inputs=inputs) as tmp:
            reports: list[TableReport] = []
            with agreed():
                if ranks.rank == 0:
                    try:
                        reports = _Stage(config, log, tmp).all()
                    except ValueError as error:
                        raise InputError(str(error)) from error
            if ranks.rank == 0:
                meta["tables"] = {report.name: asdict(report) for report in reports}
            share_lost(log)
            meta |= describe_lost(log)
    result = HashStageResult(reports, time.monotonic() - began)
    if ranks.rank == 0:
        for report in reports:
            share = f"{100 * report.rows / report.num_ids:.3g} %"
            unseen = f"; the log never has {report.unseen:,} of the ids" if report.unseen else ""
            size = format_bytes(report.map_bytes)
            print(f"{report.name}: {report.num_ids:,} ids -> {report.rows:,} rows ({share}), map {size}{unseen}")
        print(f"{config.out}: {config.method}, {result.seconds:.1f} s")
    return result


class _Stage:
    def __init__(self, config: HashStageConfig, log: Log, folder: Path) -> None:
        self.config, self.log, self.folder = config, log, folder

    def all(self) -> list[TableReport]:
        tables = read_tables(self.config, self.log)
        extend = self.config.extend
        maps = extended_maps(extend, self.log, tables) if extend else self._maps(tables)
        return [self._save(table, id_map) for table, id_map in zip(tables, maps, strict=True)]

    def _maps(self, tables: list[IdTable]) -> list[IdMap]:
        config = self.config
        if config.method in JOINT_METHODS:
            if config.features:
                raise InputError(f"method {config.method!r}: expected users and items, not features")
            pairs = read_pairs(self.log, self.log.train)
            users, items = tables
            return list(JOINT_METHODS[config.method](users, items, *pairs, budget(config, tables), config))
        if config.method not in METHODS:
            raise InputError(f"method {config.method!r}: expected one of {', '.join([*METHODS, *JOINT_METHODS])}")
        rows = rows_of_tables(config, tables)
        made = []
        for table, number in zip(tables, rows, strict=True):
            print(f"{table.name}: {table.num_ids:,} ids onto {number:,} rows", flush=True)
            with tqdm(total=table.num_ids, desc=table.name, unit="id", disable=None) as bar:
                made.append(build_map(replace(table, progress=_shown(bar)), number, config))
        return made

    def _save(self, table: IdTable, id_map: IdMap) -> TableReport:
        folder = self.folder / table.name
        folder.mkdir()
        id_map.save(folder)
        if table.embedding is not None and self.config.row_vectors:
            check_source(table.embedding, table.name, table.num_ids, table.embedding.shape[1])
            counts = None if table.counts is None else table.counts[:, None]
            vectors = shared_rows(id_map, table.embedding, counts, table.name)
            np.save(folder / ROW_VECTORS, vectors.numpy(), allow_pickle=False)
        unseen = 0 if table.counts is None else int((table.counts == 0).sum())
        return TableReport(table.name, table.num_ids, id_map.num_rows, id_map.ways, id_map.nbytes, unseen)


def _shown(bar: Any) -> Progress:
    """A callback that moves a progress bar, which starts anew with each stage."""

    def progress(stage: str, done: int, total: int) -> None:
        if done < bar.n or total != bar.total:
            bar.reset(total)
        bar.set_postfix_str(stage, refresh=False)
        bar.update(done - bar.n)

    return progress
