"""What `recpress hash` maps: the ids of users and items, or of categorical columns, their counts and embeddings."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from recpress.data import artifact
from recpress.data.config import SampleConfig
from recpress.data.errors import InputError
from recpress.data.log import Log, iter_columns
from recpress.modules.hashing.problem import IdTable
from recpress.modules.rows import RowSource
from recpress.modules.warmup import warm_up
from recpress.trainer.artifacts import open_factors
from recpress.trainer.hash.config import HashStageConfig
from recpress.trainer.hash.embeddings import read_embedding
from recpress.trainer.hash.id_maps import SIDES


def read_tables(config: HashStageConfig, log: Log) -> list[IdTable]:
    """The tables to map, in the order in which they share the budget.

    Raises:
        InputError: an embedding of no table, or that cannot be read; factors of another log; a column that is not
            there, or no label for the warm-up.
    """
    given = named("embedding", config.embedding)
    unknown = [name for name in given if name not in (config.features or SIDES)]
    if unknown:
        raise InputError(f"embedding: no table {unknown[0]!r}; tables are {', '.join(config.features or SIDES)}")
    if config.features:
        return _feature_tables(config, log, given)
    factors = open_factors(config.factors, log) if config.factors else None
    tables = []
    for side in SIDES:
        embedding: RowSource | None = None
        if side in given:
            embedding = read_embedding(given[side])
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


def _feature_tables(config: HashStageConfig, log: Log, given: dict[str, str]) -> list[IdTable]:
    """Categorical columns of the log; a warm-up gives those an embedding that were given none."""
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
    embeddings: dict[str, RowSource] = {name: read_embedding(path) for name, path in given.items()}
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


def named(option: str, pairs: tuple[str, ...]) -> dict[str, str]:
    """The values of an option that is given as NAME=VALUE. Raises InputError where one is not, or a name is twice."""
    found: dict[str, str] = {}
    for pair in pairs:
        name, sign, value = pair.partition("=")
        if not (name and sign and value) or name in found:
            raise InputError(f"{option}: {pair!r}, expected NAME=VALUE, each name once")
        found[name] = value
    return found
