"""The stage `recpress hash`: maps from the ids of tables to fewer rows, learned from counts and an embedding."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from recpress.data import artifact, storage
from recpress.data.config import SampleConfig
from recpress.data.errors import InputError
from recpress.data.log import Log, iter_columns
from recpress.modules.hashing.extend import extend_map, row_centres
from recpress.modules.hashing.id_map import IdMap
from recpress.modules.hashing.methods import JOINT_METHODS, METHODS, build_map
from recpress.modules.hashing.pairs import extend_pairs
from recpress.modules.hashing.problem import IdTable, Progress, need_embedding
from recpress.modules.hashing.split import split_rows
from recpress.modules.rows import RowSource, blocks, check_source
from recpress.modules.shared_rows import shared_rows
from recpress.modules.warmup import warm_up
from recpress.trainer.artifacts import describe_log, open_factors, shared_artifact
from recpress.trainer.config import chosen_schema
from recpress.trainer.damaged_log import describe_lost, open_on_all_ranks, share_lost
from recpress.trainer.distributed import agreed, process_group
from recpress.trainer.embeddings import read_embedding
from recpress.trainer.hash_config import HashStageConfig
from recpress.trainer.hash_report import format_bytes
from recpress.trainer.heldout import read_pairs
from recpress.trainer.id_maps import HASH, ROW_VECTORS, SIDES, open_maps
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
        with shared_artifact(config.out, HASH, meta, overwrite=config.overwrite) as tmp:
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
        self.given = _named("embedding", config.embedding)

    def all(self) -> list[TableReport]:
        tables = self._tables()
        maps = self._extended(tables) if self.config.extend else self._maps(tables)
        return [self._save(table, id_map) for table, id_map in zip(tables, maps, strict=True)]

    def _tables(self) -> list[IdTable]:
        config, log = self.config, self.log
        unknown = [name for name in self.given if name not in (config.features or SIDES)]
        if unknown:
            raise InputError(f"embedding: no table {unknown[0]!r}; tables are {', '.join(config.features or SIDES)}")
        if config.features:
            return self._feature_tables()
        factors = open_factors(config.factors, log) if config.factors else None
        tables = []
        for side in SIDES:
            embedding: RowSource | None = None
            if side in self.given:
                embedding = read_embedding(self.given[side])
            elif factors is not None:
                embedding = factors.table(side)
            tables.append(
                IdTable(
                    name=side,
                    num_ids=log.num_ids(side),
                    counts=torch.from_numpy(log.counts(side)).float(),
                    embedding=embedding,
                    vocabulary=log.vocabulary_fingerprint(side),
                )
            )
        return tables

    def _feature_tables(self) -> list[IdTable]:
        """Categorical columns of the log; a warm-up gives those an embedding that were given none."""
        config, log = self.config, self.log
        missing = [name for name in config.features if name not in log.schema.categorical]
        if missing:
            raise InputError(
                f"features: {log.path} has no categorical column {missing[0]!r}; "
                f"it has {', '.join(log.schema.categorical) or 'none'}"
            )
        known = (log.manifest or {}).get("features", {})
        sizes = {name: int(known[name]["num_ids"]) if name in known else 0 for name in config.features}
        counted = {name: np.zeros(sizes[name], np.int64) for name in config.features}
        for data in iter_columns(log.train, list(config.features)):
            for name in config.features:
                column = data[name]
                ids = column if isinstance(column, np.ndarray) else column.values
                found = np.bincount(ids, minlength=len(counted[name]))
                found[: len(counted[name])] += counted[name]
                counted[name] = found
        embeddings: dict[str, RowSource] = {name: read_embedding(path) for name, path in self.given.items()}
        bare = [name for name in config.features if name not in embeddings]
        if bare and config.method in ("cluster", "learned"):
            if not log.schema.label:
                raise InputError("schema.label: expected the label column, which the warm-up is trained on")
            warmed = warm_up(
                _labelled(log, bare, config.warm_rows, config.seed),
                [len(counted[name]) for name in bare],
                dim=config.warm_dim,
                seed=config.seed,
                names=bare,
            )
            print(f"warm-up: {warmed.rows:,} rows, mean loss {warmed.loss:.4f}", flush=True)
            embeddings |= dict(zip(bare, warmed.embeddings, strict=True))
        return [
            IdTable(
                name=name,
                num_ids=len(counted[name]),
                counts=torch.from_numpy(counted[name]).float(),
                embedding=embeddings.get(name),
                vocabulary=artifact.fingerprint(f"{log.root}/{known[name]['vocabulary']}", log.filesystem)
                if name in known
                else None,
            )
            for name in config.features
        ]

    def _maps(self, tables: list[IdTable]) -> list[IdMap]:
        config = self.config
        if config.method in JOINT_METHODS:
            if config.features:
                raise InputError(f"method {config.method!r}: expected users and items, not features")
            pairs = read_pairs(self.log, self.log.train)
            users, items = tables
            return list(JOINT_METHODS[config.method](users, items, *pairs, self._budget(tables), config))
        if config.method not in METHODS:
            raise InputError(f"method {config.method!r}: expected one of {', '.join([*METHODS, *JOINT_METHODS])}")
        rows = self._rows(tables)
        made = []
        for table, number in zip(tables, rows, strict=True):
            print(f"{table.name}: {table.num_ids:,} ids onto {number:,} rows", flush=True)
            with tqdm(total=table.num_ids, desc=table.name, unit="id", disable=None) as bar:
                made.append(build_map(replace(table, progress=_shown(bar)), number, config))
        return made

    def _budget(self, tables: list[IdTable]) -> int:
        config, ids = self.config, sum(table.num_ids for table in tables)
        rows = config.rows or round(config.share * ids)
        if config.bytes:
            widths = {table.embedding.shape[1] for table in tables if table.embedding is not None}
            if len(widths) != 1:
                raise InputError("bytes: expected embeddings of one dimension, which the size of a row follows from")
            rows = int(config.bytes // (4 * widths.pop()))
        if not len(tables) <= rows <= ids:
            raise InputError(f"a budget of {rows:,} rows: expected {len(tables)} to {ids:,}, the ids of all tables")
        return rows

    def _rows(self, tables: list[IdTable]) -> list[int]:
        config, budget = self.config, self._budget(tables)
        fixed = {name: _number(name, text) for name, text in _named("table_rows", config.table_rows).items()}
        names = [table.name for table in tables]
        unknown = [name for name in fixed if name not in names]
        if unknown:
            raise InputError(f"table_rows: no table {unknown[0]!r}; tables are {', '.join(names)}")
        rest = [table for table in tables if table.name not in fixed]
        left = budget - sum(fixed.values())
        if rest and left < len(rest):
            raise InputError(f"table_rows: {sum(fixed.values()):,} rows of a budget of {budget:,} leave too few")
        learned = config.method in ("cluster", "learned")
        for table in tables if learned else ():
            need_embedding(table, config.method)
        if learned and config.split == "distortion" and len(rest) > 1:
            shares = split_rows(self._comparable(rest), min(left, sum(t.num_ids for t in rest)), config)
        else:
            shares = _by_ids([table.num_ids for table in rest], left)
        found = fixed | {table.name: rows for table, rows in zip(rest, shares, strict=True)}
        return [found[name] for name in names]

    def _comparable(self, tables: list[IdTable]) -> list[IdTable]:
        """Users and items in units of the scores that an error of them moves; warm-ups are in such units already."""
        if self.config.features or len(tables) != 2:
            return tables
        grams = []
        for table in tables:
            assert table.embedding is not None
            rows, dim = table.embedding.shape
            gram = torch.zeros(dim, dim, dtype=torch.float64)
            for _, block in blocks(table.embedding, table.name, (0, rows), (0, dim)):
                gram += (block.T @ block).double()
            grams.append(gram)
        if grams[0].shape != grams[1].shape:
            return tables
        return [
            replace(table, embedding=_Turned(table.embedding, root(gram)))  # type: ignore[arg-type]
            for table, gram in zip(tables, reversed(grams), strict=True)
        ]

    def _extended(self, tables: list[IdTable]) -> list[IdMap]:
        """The maps of an earlier artifact, with the ids that came since."""
        assert self.config.extend is not None
        before = open_maps(self.config.extend, None)
        made = []
        for table in tables:
            old = before.map(table.name)
            self._check_extends(table, old)
            if table.num_ids < old.num_ids:
                raise InputError(
                    f"{self.config.extend}: table {table.name!r} covers {old.num_ids} ids, and {self.log.path} has "
                    f"{table.num_ids}; expected a log that extends the one it was made for"
                )
            source = table.embedding
            if source is None or table.num_ids == old.num_ids:
                made.append(extend_map(old, table.num_ids, vocabulary=table.vocabulary))
                continue
            before_ids, arrived = _Range(source, 0, old.num_ids), _Range(source, old.num_ids, table.num_ids)
            if old.ways == 2 and old.weights is not None:
                counts = None if table.counts is None else table.counts[: old.num_ids, None]
                centres = shared_rows(old, before_ids, counts, table.name)
                made.append(extend_pairs(old, table.num_ids, arrived, centres, vocabulary=table.vocabulary))
            elif old.ways == 1:
                centres = row_centres(old, before_ids, _head(table.counts, old.num_ids))
                made.append(
                    extend_map(old, table.num_ids, centres=centres, embedding=arrived, vocabulary=table.vocabulary)
                )
            else:
                made.append(extend_map(old, table.num_ids, vocabulary=table.vocabulary))
        return made

    def _check_extends(self, table: IdTable, old: IdMap) -> None:
        """Raise InputError where the log's ids are known by a vocabulary that does not begin with the map's."""
        manifest = self.log.manifest or {}
        if table.name not in manifest.get("vocabularies", {}) and table.name not in manifest.get("features", {}):
            return  # the log came with dense ids, and only their number can be compared
        extends = manifest.get("extends", {})
        parent = extends.get("vocabularies", {}).get(table.name)
        if extends and table.name in manifest.get("features", {}):
            with contextlib.suppress(OSError, InputError):  # the log before is gone: then nothing says what it was
                file = manifest["features"][table.name]["vocabulary"]
                parent = artifact.fingerprint(storage.join(extends["log"], file))
        if old.vocabulary not in (None, table.vocabulary, parent):
            raise InputError(
                f"{self.config.extend}: table {table.name!r} was made for another vocabulary than that which "
                f"{self.log.path} extends; the same ids mean others"
            )

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


class _Range:
    """Rows first to last - 1 of a source."""

    def __init__(self, source: RowSource, first: int, last: int) -> None:
        self._source, self._first = source, first
        self.shape = (last - first, source.shape[1])

    def __getitem__(self, index: Any) -> Any:
        rows, columns = index if isinstance(index, tuple) else (index, slice(None))
        start, stop, _ = rows.indices(self.shape[0])
        return self._source[self._first + start : self._first + stop, columns]


def _head(counts: torch.Tensor | None, number: int) -> torch.Tensor | None:
    return None if counts is None else counts[:number].clamp_min(0.1)


def _by_ids(ids: list[int], budget: int) -> list[int]:
    """Rows in proportion to the ids: at least 1, at most the ids, the budget in all where it can be spent."""
    rows = [1] * len(ids)
    left = min(budget, sum(ids)) - len(ids)
    total = sum(ids)
    for place, number in sorted(enumerate(ids), key=lambda pair: pair[1]):
        take = min(number - 1, left, round(left * number / total)) if total else 0
        rows[place] += take
        left, total = left - take, total - number
    for place, number in sorted(enumerate(ids), key=lambda pair: -pair[1]):  # what rounding left over
        take = min(left, number - rows[place])
        rows[place], left = rows[place] + take, left - take
    return rows


def _named(option: str, pairs: tuple[str, ...]) -> dict[str, str]:
    found: dict[str, str] = {}
    for pair in pairs:
        name, sign, value = pair.partition("=")
        if not (name and sign and value) or name in found:
            raise InputError(f"{option}: {pair!r}, expected NAME=VALUE, each name once")
        found[name] = value
    return found


def _number(name: str, text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise InputError(f"table_rows: {name}={text}, expected a number of rows, 1 or more")
    return int(text)


def _labelled(
    log: Log, features: list[str], limit: int, seed: int, size: int = 8192
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """(numbers, ids, label) of a uniform sample of about `limit` rows of train, in batches, in the order of the log."""
    schema = log.schema
    assert schema.label
    sample = SampleConfig(rate=min(1.0, limit / log.train.num_rows), seed=seed)
    for data in iter_columns(log.train, [*features, *schema.floats, schema.label], sample=sample):
        ids = torch.stack([torch.from_numpy(np.asarray(data[name])) for name in features], 1)
        label = torch.from_numpy(np.asarray(data[schema.label])).float()
        numbers = [torch.from_numpy(np.asarray(data[name])).float().nan_to_num(0.0) for name in schema.floats]
        dense = torch.stack(numbers, 1) if numbers else torch.zeros(len(label), 0)
        dense = dense.sign() * dense.abs().log1p()  # Criteo's numbers are counts with long tails
        for first in range(0, len(label), size):
            part = slice(first, first + size)
            yield dense[part], ids[part], label[part]
