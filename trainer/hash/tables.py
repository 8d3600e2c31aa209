"""The tables of `recpress hash`: users and items, or categorical columns, with counts and embeddings of their ids."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator

import numpy as np
import torch
import torch.distributed as dist

from recpress.data.config import SampleConfig
from recpress.data.dataset import artifact
from recpress.data.dataset.columns import is_dense, is_list, to_tensor
from recpress.data.dataset.hashed_ids import shared_ids
from recpress.data.dataset.log import SIDES, Log
from recpress.data.dataset.parquet_split import SplitFile
from recpress.data.errors import InputError
from recpress.data.sampling.scan import iter_columns
from recpress.modules.hashing.methods import FROM_EMBEDDING, METHODS
from recpress.modules.hashing.table_stats import TableStats
from recpress.modules.hashing.warm_up import warm_up
from recpress.modules.row_source import RowSource
from recpress.trainer.artifacts.factors import open_factors
from recpress.trainer.distributed.collectives import all_gather, all_reduce, rank_and_world
from recpress.trainer.distributed.heartbeat import activity
from recpress.trainer.distributed.rank_errors import raise_on_all_ranks
from recpress.trainer.hash.config import HashStageConfig
from recpress.trainer.hash.embeddings import read_embedding
from recpress.trainer.observability.progress import Progress
from recpress.trainer.report.numbers import format_bytes

logger = logging.getLogger(__name__)
_BYTES_PER_ID = 24
"""Of memory, at least: counts as int64, of a rank and of all, and as float32; the map."""
MOST_SHARED = 0.5
"""Share of raw ids that collide in the hash of --schema.hashed, above which a warning says so."""
_Labelled = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def read_tables(config: HashStageConfig, log: Log) -> list[TableStats]:
    """The tables to map, in the order in which they share the budget; the same on every rank. Collective.

    Raises:
        InputError: an embedding of an unknown table, or one that cannot be read; factors of another log; a missing
            column; no label for the warm-up.
    """
    with raise_on_all_ranks():
        given = named("embedding", config.embedding)
        unknown = [name for name in given if name not in (config.features or SIDES)]
        if unknown:
            raise InputError(f"embedding: no table {unknown[0]!r}; tables are {', '.join(config.features or SIDES)}")
    if config.features:
        return _feature_tables(config, log, given)
    embeddings: dict[str, RowSource] = {}
    counts: dict[str, np.ndarray] = {}
    with raise_on_all_ranks():
        factors = open_factors(config.factors, log) if config.factors else None
        for side in SIDES:
            if side in given:
                embeddings[side] = read_embedding(given[side])
            elif factors is not None:
                embeddings[side] = factors.table(side)
            if log.vocabulary(side) is not None:
                counts[side] = log.counts(side)
    dense = {side: log.num_ids(side) for side in SIDES if side not in counts}
    if dense:
        found = _count(log, {log.column(side): number for side, number in dense.items()})
        counts |= {side: found[log.column(side)] for side in dense}
    tables: list[TableStats] = []
    with raise_on_all_ranks():
        tables = [
            TableStats(
                name=side,
                num_ids=log.num_ids(side),
                counts=torch.from_numpy(counts[side]).float(),
                embedding=embeddings.get(side),
                vocabulary=log.vocabulary_fingerprint(side),
            )
            for side in SIDES
        ]
    return tables


def _count(log: Log, columns: dict[str, int], per_id: int = _BYTES_PER_ID) -> dict[str, np.ndarray]:
    """Rows of train per id, by column. One rank reads each row group. Collective.

    Args:
        columns: name -> number of ids; the result has more if the log has a greater id.
        per_id: bytes of memory that an id needs in all.

    Raises:
        InputError: ids that are not dense, or too many for the memory. On every rank.
    """
    rank, world = rank_and_world()
    with raise_on_all_ranks():
        _check_memory(log, columns, per_id)
    counted = {name: np.zeros(size, np.int64) for name, size in columns.items()}
    with raise_on_all_ranks(), activity("counting ids"), Progress("counting ids", "row", show=rank == 0) as bar:
        for data in iter_columns(log.train, list(columns), rank=rank, world=world):
            for name in columns:
                column = data[name]
                ids = column if isinstance(column, np.ndarray) else column.values
                largest = int(ids.max(initial=-1))
                if log.hash_fingerprint(name) is None and not is_dense(largest, log.train.num_rows):
                    raise InputError(
                        f"{log.path}, column '{name}': id {largest} in a log of {log.train.num_rows} rows; expected "
                        "dense ids, numbered from 0; run `recpress ingest`, which numbers raw ids"
                    )
                if largest >= len(counted[name]):
                    counted[name] = np.pad(counted[name], (0, largest + 1 - len(counted[name])))
                if len(counted[name]) > 16 * len(ids):  # a large hashed column
                    distinct, times = np.unique(ids, return_counts=True)
                    counted[name][distinct] += times
                else:
                    counted[name] += np.bincount(ids, minlength=len(counted[name]))
            bar.update(len(next(iter(data.values()))))
    sizes = torch.stack(all_gather(torch.tensor([len(array) for array in counted.values()]))).amax(0).tolist()
    total = {}
    for (name, array), size in zip(counted.items(), sizes, strict=True):
        total[name] = all_reduce(torch.from_numpy(np.pad(array, (0, size - len(array))))).numpy()
    if rank == 0:
        _report_collisions(log, total)
    return total


def _check_memory(log: Log, columns: dict[str, int], per_id: int) -> None:
    """Raises InputError if so many ids, of `per_id` bytes each, cannot fit the memory of this machine."""
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    needed = ranks * per_id * sum(columns.values())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > memory:
        name = max(columns, key=columns.__getitem__)
        fix = "a smaller number in --schema.hashed" if log.hash_of(name) else "ids that `recpress ingest` numbers"
        raise InputError(
            f"{log.path}, column '{name}': {columns[name]:,} ids; the counts, vectors and maps of all tables need at "
            f"least {format_bytes(needed)} for the {ranks} ranks of this machine, which has {format_bytes(memory)}; "
            f"expected {fix}"
        )


def _report_collisions(log: Log, counts: dict[str, np.ndarray]) -> None:
    for name, of_id in counts.items():
        if log.hash_fingerprint(name) is None:
            continue
        distinct, shared = shared_ids(of_id)
        level = logging.WARNING if shared > MOST_SHARED else logging.INFO
        advice = "; a larger number in --schema.hashed makes them fewer" if shared > MOST_SHARED else ""
        logger.log(
            level,
            "column '%s': about %s raw ids, hashed into %s: %.0f %% of them share an id with another%s",
            *(name, f"{distinct:,}", f"{len(of_id):,}", 100 * shared, advice),
        )


def _feature_tables(config: HashStageConfig, log: Log, given: dict[str, str]) -> list[TableStats]:
    """Categorical columns of the log. A warm-up computes the embeddings that are not given."""
    missing = [name for name in config.features if name not in log.schema.categorical]
    if missing:  # the schema is the same on every rank
        raise InputError(
            f"features: {log.path} has no categorical column {missing[0]!r}; "
            f"it has {', '.join(log.schema.categorical) or 'none'}"
        )
    known = (log.manifest or {}).get("features", {})
    bare = [name for name in config.features if name not in given] if config.method in FROM_EMBEDDING else []
    per_id = _BYTES_PER_ID + (8 * (1 + config.warm_dim) if bare else 0)  # rows, and the optimizer's state
    counted = _count(log, {name: log.train.columns[name].limit or 0 for name in config.features}, per_id)
    lists = [name for name in bare if any(_is_list(file, name) for file in log.train.files)]
    if lists:
        others = ", ".join(name for name in METHODS if name not in FROM_EMBEDDING)
        raise InputError(
            f"features: {lists[0]!r} is a list; the warm-up expects one id per row; pass --embedding {lists[0]}=FILE, "
            f"or a --method that needs no embedding: {others}"
        )
    embeddings: dict[str, RowSource] = {}
    with raise_on_all_ranks():
        embeddings = {name: read_embedding(path) for name, path in given.items()}
    if bare:
        if not log.schema.label:
            raise InputError("schema.label: expected the label column, which the warm-up is trained on")
        embeddings |= _warmed(config, log, {name: len(counted[name]) for name in bare})
    tables = []
    with raise_on_all_ranks():
        for name in config.features:
            vocabulary = log.hash_fingerprint(name)
            if name in known:
                vocabulary = artifact.fingerprint(f"{log.root}/{known[name]['vocabulary']}", log.filesystem)
            tables.append(
                TableStats(
                    name=name,
                    num_ids=len(counted[name]),
                    counts=torch.from_numpy(counted[name]).float(),
                    embedding=embeddings.get(name),
                    vocabulary=vocabulary,
                )
            )
    return tables


def _is_list(file: SplitFile, name: str) -> bool:
    return file.metadata is not None and is_list(file.schema.field(name).type)


def _warmed(config: HashStageConfig, log: Log, sizes: dict[str, int]) -> dict[str, RowSource]:
    """Embeddings from the warm-up, one pass over the log on rank 0, which broadcasts the result. Collective."""
    rank, world = rank_and_world()
    made = [torch.zeros(size, 1 + config.warm_dim) for size in sizes.values()]
    with raise_on_all_ranks(), activity("warm-up of the features' embeddings"):
        if rank == 0:
            with Progress("warm-up", "row") as bar, warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # torch's, of layers without inputs and of sparse rows
                warmed = warm_up(
                    _shown(_labelled(log, list(sizes), config.warm_rows, config.seed), bar),
                    list(sizes.values()),
                    dim=config.warm_dim,
                    seed=config.seed,
                    names=list(sizes),
                )
            logger.info(f"warm-up: {warmed.rows:,} rows, mean loss {warmed.loss:.4f}")
            made = warmed.embeddings
    if world > 1:
        for table in made:
            dist.broadcast(table, 0)
    return dict(zip(sizes, made, strict=True))


def _shown(batches: Iterator[_Labelled], bar: Progress) -> Iterator[_Labelled]:
    for batch in batches:
        yield batch
        bar.update(len(batch[2]))


def _labelled(log: Log, features: list[str], limit: int, seed: int, size: int = 8192) -> Iterator[_Labelled]:
    """(numbers, ids, label) of a uniform sample of about `limit` rows of train, in batches, in the order of the log."""
    schema = log.schema
    assert schema.label
    sample = SampleConfig(rate=min(1.0, limit / log.train.num_rows), seed=seed)
    for data in iter_columns(log.train, [*features, *schema.floats, schema.label], sample=sample):
        ids = torch.stack([to_tensor(np.asarray(data[name])) for name in features], 1)
        label = to_tensor(np.asarray(data[schema.label])).float()
        numbers = [to_tensor(np.asarray(data[name])).float().nan_to_num(0.0) for name in schema.floats]
        dense = torch.stack(numbers, 1) if numbers else torch.zeros(len(label), 0)
        dense = dense.sign() * dense.abs().log1p()  # Criteo's numbers are counts with long tails
        for first in range(0, len(label), size):
            part = slice(first, first + size)
            yield dense[part], ids[part], label[part]


def named(option: str, pairs: tuple[str, ...]) -> dict[str, str]:
    """The values of an option of the form NAME=VALUE. Raises InputError for another form, or a name given twice."""
    found: dict[str, str] = {}
    for pair in pairs:
        name, sign, value = pair.partition("=")
        if not (name and sign and value) or name in found:
            raise InputError(f"{option}: {pair!r}, expected NAME=VALUE, each name once")
        found[name] = value
    return found
