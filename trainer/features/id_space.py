"""What the ids of an embedding table mean, as a manifest records it, and which of them another log has, too."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from recpress.data.dataset import artifact
from recpress.data.dataset.files import exists, resolve
from recpress.data.dataset.log import SIDES, Log, Side
from recpress.data.dataset.parquet_split import read_whole
from recpress.data.errors import InputError
from recpress.data.ingest.vocabulary import raw_fingerprint
from recpress.modules.hashing.id_map import IdMap, map_fingerprint
from recpress.trainer.artifacts.factors import FactorsArtifact
from recpress.trainer.features.feature_set import Feature, FeatureSet
from recpress.trainer.features.numbers import Numbers
from recpress.trainer.features.tables import vocabulary_of

_BLOCK = 1 << 20  # ids of a map that are compared at a time


@dataclass(frozen=True, kw_only=True)
class IdSpace:
    """The ids of a table. `asdict` of it is JSON."""

    num_ids: int
    vocabulary: str | None = None
    """Fingerprint of the vocabulary, of the hash, or of the boundaries of buckets; None: dense ids without one."""
    file: str | None = None
    """Vocabulary, below the folder of the log; None of a hash, or without one."""
    in_order: bool = False
    """Whether the fingerprint is one of the raw ids in their order, not of the file."""
    map_name: str | None = None
    """Name of the id map of the table; None without a map."""
    map: str | None = None
    """Fingerprint of that map."""
    factors: str | None = None
    """Fingerprint of frozen rows; None of a trainable table."""


@dataclass(frozen=True)
class Match:
    """Which ids of a table an earlier table has."""

    old: np.ndarray | None
    """Id -> earlier id, or -1; None: ids below `shared` are the same."""
    shared: int
    """Number of ids that both have."""

    def of(self, first: int, last: int) -> np.ndarray:
        """The earlier ids of ids first to last - 1, -1 of new ids: int64."""
        ids = np.arange(first, last)
        if self.old is None:
            return np.where(ids < self.shared, ids, -1)
        found = np.full(last - first, -1, dtype=np.int64)  # a table may have rows beyond its ids
        known = self.old[first:last]
        found[: len(known)] = known
        return found


def with_map(space: IdSpace, name: str, id_map: IdMap | None) -> IdSpace:
    """The space of a table behind a map."""
    if id_map is None:
        return space
    fingerprint = bytes(map_fingerprint(id_map).tolist()).hex()
    return replace(space, map_name=name, map=fingerprint)


def side_space(log: Log, side: Side) -> IdSpace:
    """The users or items of a log."""
    if log.hash_fingerprint(log.column(side)) is not None:
        return IdSpace(num_ids=log.num_ids(side), vocabulary=log.vocabulary_fingerprint(side))
    if log.manifest is None or side not in log.manifest.get("vocabularies", {}):
        return IdSpace(num_ids=log.num_ids(side))
    return IdSpace(
        num_ids=log.num_ids(side),
        vocabulary=log.vocabulary_fingerprint(side),
        file=f"vocabulary/{side}.parquet",
        in_order=True,
    )


def table_spaces(log: Log, features: FeatureSet, looked_up: Mapping[str, Sequence[str]]) -> dict[str, IdSpace]:
    """Table of a model -> its ids.

    Args:
        looked_up: table -> its features. A model may have tables that are not those of the features.
    """
    by_name = {feature.name: feature for feature in features.features}
    of_feature = {name: table for table in features.tables for name in table.features}
    found = {}
    for name, keys in looked_up.items():
        num_ids = max(of_feature[key].num_ids for key in keys)
        space = _column_space(log, [by_name[key] for key in keys], features.numbers, num_ids)
        if (table := next((table for table in features.tables if table.name == name), None)) is not None:
            factors = table.frozen.fingerprint if isinstance(table.frozen, FactorsArtifact) else None
            space = replace(with_map(space, name, table.id_map), factors=factors)
        found[name] = space
    return found


def _column_space(log: Log, features: Sequence[Feature], numbers: Mapping[str, Numbers], num_ids: int) -> IdSpace:
    """The ids of a table that these features look up."""
    for feature in features:
        if feature.kind == "bucketized":
            boundaries = json.dumps(numbers[feature.name].boundaries)
            return IdSpace(num_ids=num_ids, vocabulary=hashlib.sha256(boundaries.encode()).hexdigest()[:32])
    for feature in features:
        for side in SIDES:
            if feature.source == "log" and feature.column == log.column(side):
                return replace(side_space(log, side), num_ids=num_ids)
    for feature in features:
        known = (log.manifest or {}).get("features", {}).get(feature.column, {})
        if feature.source == "log" and known.get("vocabulary") and known.get("fingerprint"):
            return IdSpace(num_ids=num_ids, vocabulary=known["fingerprint"], file=known["vocabulary"], in_order=True)
        if (vocabulary := vocabulary_of(log, feature)) is not None:
            return IdSpace(num_ids=num_ids, vocabulary=vocabulary, file=known.get("vocabulary"))
    return IdSpace(num_ids=num_ids)


def read_space(values: Mapping[str, Any], where: str) -> IdSpace:
    """What `asdict` wrote. Raises InputError if it is not that."""
    try:
        return IdSpace(**values)
    except TypeError as error:
        raise InputError(f"{where}: its manifest does not describe tables of this release: {error}") from error


def match_ids(new: IdSpace, log: Log, old: IdSpace, old_log: str, table: str) -> Match:
    """Which ids of `table` the earlier space has: by their raw ids if there are vocabularies, else by number.

    Args:
        old_log: address of the log of the earlier space. Read only if its vocabulary is not the start of that of `log`.

    Raises:
        InputError: it cannot be decided which ids are the same.
    """
    what = f"table '{table}'"
    if new.vocabulary == old.vocabulary:
        if new.vocabulary is None and new.num_ids < old.num_ids:
            raise InputError(
                f"{what}: {new.num_ids:,} ids, but the earlier model has {old.num_ids:,}, and neither log has a "
                "vocabulary that says which are the same; expected at least as many, or --warm-start-names "
                f"{table}= to omit it"
            )
        return Match(None, min(new.num_ids, old.num_ids))
    if new.file is None or old.file is None:
        raise InputError(
            f"{what}: its ids are numbered or hashed otherwise than those of the earlier model "
            f"({_said(old)} then, {_said(new)} now); expected the same vocabulary, one that extends it "
            f"(`recpress ingest --extend`), or --warm-start-names {table}= to omit it"
        )
    raw = _raw(log, new)
    extends = new.in_order and old.in_order and len(raw) >= old.num_ids
    if extends and raw_fingerprint(raw.slice(0, old.num_ids)) == old.vocabulary:
        return Match(None, old.num_ids)
    before = _old_raw(old, old_log, what, table)
    if before.type != raw.type:
        raise InputError(f"{what}: raw ids are {raw.type}, those of {old_log} {before.type}; expected one type")
    found = pc.index_in(raw, value_set=before.combine_chunks()).fill_null(-1)
    ids = np.full(new.num_ids, -1, dtype=np.int64)  # num_ids may leave room for new ids
    ids[: len(found)] = found.to_numpy()
    return Match(ids, int((ids >= 0).sum()))


def _said(space: IdSpace) -> str:
    if space.vocabulary is None:
        return f"{space.num_ids:,} dense ids"
    return f"{'vocabulary' if space.file else 'hash'} {space.vocabulary}"


def _raw(log: Log, space: IdSpace) -> pa.ChunkedArray:
    return read_whole(log.filesystem, f"{log.root}/{space.file}", ["raw"]).column("raw")


def _old_raw(space: IdSpace, log: str, what: str, table: str) -> pa.ChunkedArray:
    filesystem, inner = resolve(log)
    path = f"{inner}/{space.file}"
    fix = (
        f"expected that log, to match ids by their raw ids, a vocabulary that extends it (`recpress ingest --extend`), "
        f"or --warm-start-names {table}= to omit the table"
    )
    if not exists(filesystem, path):
        raise InputError(f"{what}: {log}/{space.file}, the vocabulary of the earlier model, is missing; {fix}")
    raw = read_whole(filesystem, path, ["raw"]).column("raw")
    now = raw_fingerprint(raw) if space.in_order else artifact.fingerprint(path, filesystem)
    if now != space.vocabulary:
        raise InputError(f"{what}: {log}/{space.file} is not the vocabulary of the earlier model any more; {fix}")
    return raw


def same_rows(match: Match, new: IdMap, old: IdMap) -> bool:
    """Whether two maps give the ids that both have the same rows and weights."""
    if new.rows_per_id != old.rows_per_id or (new.weights is None) != (old.weights is None):
        return False
    for first in range(0, new.num_ids, _BLOCK):
        before = torch.from_numpy(match.of(first, min(first + _BLOCK, new.num_ids)).copy())
        known = (before >= 0).nonzero()[:, 0]
        for now, then in ((new.rows, old.rows), (new.weights, old.weights)):
            if now is not None and then is not None and not torch.equal(now[first + known], then[before[known]]):
                return False
    return True
