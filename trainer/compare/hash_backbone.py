"""The backbone of `compare hash`: weighted least squares on the rows of a map, and how vectors are ranked."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from recpress.data.dataset.log import open_log
from recpress.data.errors import InputError
from recpress.data.synthetic import interactions as data_synth
from recpress.modules.als.checks import check_factors
from recpress.modules.als.exchange import Exchange
from recpress.modules.als.factorization import ALS
from recpress.modules.als.factors import Factors
from recpress.modules.als.interactions import InteractionBuilder
from recpress.modules.config import ALSConfig, ALSParameters
from recpress.modules.hashing.budget import split_rows
from recpress.modules.hashing.id_map import IdMap
from recpress.modules.hashing.methods import JOINT_METHODS, build_map
from recpress.modules.hashing.shared_als import SharedALS
from recpress.modules.hashing.table_stats import TableStats
from recpress.modules.row_source import round_up
from recpress.trainer.compare.config import CompareHashConfig
from recpress.trainer.compare.hash_settings import BY_DISTORTION, BY_IDS, Setting
from recpress.trainer.config import chosen_schema
from recpress.trainer.evaluate.heldout import FullHeldout, full_from_pairs, read_pairs
from recpress.trainer.evaluate.ranking import evaluate_full, vectors_from_factors
from recpress.trainer.hash.budget import root


class Vectors(NamedTuple):
    """What is ranked: the score of a user and an item is the dot product."""

    users: torch.Tensor
    """(num_users, d) float32"""
    items: torch.Tensor
    """(num_items, d) float32"""


Report = Callable[[str], None]
"""Takes a line about the progress of a run."""


@dataclass(frozen=True)
class MapStats:
    """Of the maps of users and items together."""

    rows: int
    nbytes: int
    """Bit-packed, with weights; 0 for formulas."""
    serving_bytes: int
    """As `LearnedHash` serves a map by default: int32 rows and weights; 0 for formulas."""
    seconds: float
    """That it took to make them."""

    @classmethod
    def of(cls, maps: Sequence[IdMap], seconds: float) -> MapStats:
        stored = [m for m in maps if not m.computed]
        serving = sum(m.rows.nbytes + (0 if m.weights is None else m.weights.nbytes) for m in stored)
        return cls(sum(m.num_rows for m in maps), sum(m.nbytes for m in maps), serving, seconds)


class Backbone:
    """Log, held-out examples and factorization that all methods share. One process. A subclass trains other vectors.

    Raises:
        InputError: the log has no test rows; the budget of rows cannot be used.
    """

    NOTE = (
        "The backbone is weighted least squares with one row per id (full) or with the rows of the map: the map is "
        "made, rows start nearest to the full factors, and sweeps of the same loss follow. The score is the dot "
        "product; an id has no other input than its row."
    )
    """For the report."""

    def __init__(self, config: CompareHashConfig, folder: Path) -> None:
        self.config = config
        path = config.data or str(folder / "log")
        if config.data is None:
            data_synth.synth(config.synth, path)
        self.log = open_log(path, chosen_schema(config.schema))
        if self.log.test is None:
            raise InputError(f"{path}: no test rows, which a comparison needs")
        self.train = read_pairs(self.log, self.log.train)
        self.val, self.test = self._held_out()
        builder = InteractionBuilder(self.log.num_users, self.log.num_items, Exchange(None, torch.device("cpu")))
        builder.add(*self.train)
        self._csrs = builder.build()
        self.counts = [torch.from_numpy(np.diff(csr.indptr)).float() for csr in self._csrs]
        """Train examples of each user and of each item, float32."""
        self.ids = self.log.num_users + self.log.num_items
        self.budget = config.rows or round(config.share * self.ids)
        """Embedding rows of users and items together."""
        if not 2 <= self.budget <= self.ids:
            raise InputError(f"rows: a budget of {self.budget}, expected 2 to {self.ids}, the ids of the log")
        self.metrics = tuple(f"{kind}@{k}" for k in config.evaluation.k for kind in config.metrics)
        self.dim = 0
        """Of the factors; known after the first factorization."""
        self.chosen_als: dict[str, Any] = {}
        """Settings of the factorization that were not given and have been chosen."""
        self.warnings: list[str] = []
        """Signs that the factorization collapsed."""
        self._parameters: ALSParameters | None = None  # chosen with the first seed, the same for all

    @property
    def row_bytes(self) -> int:
        """Of one float32 embedding row."""
        return 4 * round_up(self.dim)

    @property
    def vector_dim(self) -> int:
        """Of the vectors that are ranked."""
        return self.dim

    def _held_out(self) -> tuple[FullHeldout, FullHeldout]:
        """Validation examples of some users, train masked; test examples of all, train and validation masked."""
        log, users, items = self.log, self.log.num_users, self.log.num_items
        assert log.test is not None
        if log.val is None:  # one in ten of the train examples
            draw = np.random.default_rng(0).random(len(self.train[0])) < 0.1
            val = (self.train[0][draw], self.train[1][draw])
            self.train = (self.train[0][~draw], self.train[1][~draw])
        else:
            val = read_pairs(log, log.val)
        seen = tuple(np.concatenate(both) for both in zip(self.train, val, strict=True))
        test = full_from_pairs(read_pairs(log, log.test), (seen[0], seen[1]), num_users=users, num_items=items)
        some = np.unique(val[0])
        if len(some) > self.config.choose_users:
            some = np.random.default_rng(0).choice(some, self.config.choose_users, replace=False)
        in_val, in_train = np.isin(val[0], some), np.isin(self.train[0], some)
        validation = full_from_pairs(
            (val[0][in_val], val[1][in_val]),
            (self.train[0][in_train], self.train[1][in_train]),
            num_users=users,
            num_items=items,
        )
        return validation, test

    def factorize(self, seed: int) -> tuple[Factors, str]:
        """(factors of all ids, what was chosen in words or nothing). Settings that are not given are chosen with the
        first seed, among all items as the methods are compared, and are the same for all seeds."""
        given = self.config.als
        open_settings = replace(given, auto_metric="full") if given.auto_metric == "auto" else given
        settings: ALSConfig | ALSParameters = self._parameters or open_settings
        als = ALS(replace(settings, seed=seed), self.log.num_users, self.log.num_items)
        als.add(*self.train)
        full = als.fit()
        if self._parameters is not None:
            return full, ""
        self._parameters, self.dim = als.parameters, full.users.shape[1]
        self.warnings = check_factors(full, als)
        if als.choice is None:
            return full, ""
        self.chosen_als = als.choice.settings
        return full, als.choice.line()

    def make_maps(self, setting: Setting, full: Factors, budget: int) -> tuple[tuple[IdMap, IdMap], MapStats]:
        """Maps onto `budget` rows. Raises ValueError if the method cannot use the budget."""
        began = time.perf_counter()
        users, items = (
            TableStats(name=name, num_ids=len(vectors), counts=counts, embedding=vectors)
            for name, vectors, counts in zip(("user", "item"), (full.users, full.items), self.counts, strict=True)
        )
        if setting.hash.method in JOINT_METHODS:
            maps = JOINT_METHODS[setting.hash.method](users, items, *self.train, budget, setting.hash)
        else:
            user_rows, item_rows = self._split(setting, (users, items), full, budget)
            maps = (build_map(users, user_rows, setting.hash), build_map(items, item_rows, setting.hash))
        return maps, MapStats.of(maps, time.perf_counter() - began)

    def make_maps_within_bytes(
        self, setting: Setting, full: Factors, map_bytes: int
    ) -> tuple[tuple[IdMap, IdMap], MapStats] | str:
        """Maps that fit, with their rows, into the bytes of `budget` rows; or why there are none.

        Args:
            map_bytes: of the maps onto `budget` rows, whose row numbers take at least as many bits.
        """
        limit = self.row_bytes * self.budget
        for _ in range(4):
            rows = (limit - map_bytes) // self.row_bytes
            if rows < 2:
                return f"does not fit: the map alone takes {map_bytes:,} of {limit:,} bytes"
            try:
                maps, stats = self.make_maps(setting, full, rows)
            except ValueError as error:
                return f"does not fit: {error}"
            size = stats.rows * self.row_bytes + stats.nbytes
            if size <= limit:
                return maps, stats
            map_bytes += size - limit  # the rows were split in another way
        return f"does not fit: no number of rows with its map takes at most {limit:,} bytes"

    def _split(
        self, setting: Setting, tables: tuple[TableStats, TableStats], full: Factors, budget: int
    ) -> tuple[int, int] | list[int]:
        """Rows of users and of items."""
        users, items = self.log.num_users, self.log.num_items
        if setting.user_share == BY_DISTORTION:
            # an error of a vector counts by what it does to the scores: x' Y'Y x of users, and likewise of items
            scaled = [
                replace(table, embedding=vectors @ root(others.T @ others))
                for table, vectors, others in zip(
                    tables, (full.users, full.items), (full.items, full.users), strict=True
                )
            ]
            return split_rows(scaled, budget, setting.hash)
        share = users / (users + items) if setting.user_share == BY_IDS else setting.user_share
        first = min(max(round(share * budget), 1, budget - items), users, budget - 1)
        return first, budget - first

    def full_vectors(self, full: Factors, seed: int, report: Report) -> tuple[Vectors, float]:
        """(vectors with one row per id, seconds of training them besides the factorization)."""
        return Vectors(full.users, full.items), 0.0

    def fit(self, setting: Setting, maps: tuple[IdMap, IdMap], full: Factors, report: Report) -> tuple[Vectors, float]:
        """(vectors read through the maps, seconds): sweeps of the loss from the rows nearest to the full factors."""
        assert self._parameters is not None
        assert setting.sweeps is not None
        began = time.perf_counter()
        als = SharedALS(replace(self._parameters, sweeps=setting.sweeps), *self._csrs, *maps)
        found = als.fit(full.users, full.items)
        return Vectors(found.users, found.items), time.perf_counter() - began

    def finish(self) -> None:
        """Remove what a stopped comparison would resume from."""

    def test_metrics(self, users: torch.Tensor, items: torch.Tensor) -> tuple[dict[str, float], np.ndarray]:
        """(metrics of the test examples, first metric of each user as float32)."""
        per_case: dict[str, torch.Tensor] = {}
        metrics = self.rank(users, items, self.test, per_case)
        return metrics, per_case[self.metrics[0]].float().numpy()

    def rank(
        self,
        users: torch.Tensor,
        items: torch.Tensor,
        heldout: FullHeldout,
        per_case: dict[str, torch.Tensor] | None = None,
    ) -> dict[str, float]:
        """Metrics, with ties broken at random by a last column of negligible weight, as ids that share a row tie."""
        scale = 1e-6 * float((users[:1000] @ items[:1000].T).std())
        noise = torch.rand(len(items), 1, generator=torch.Generator().manual_seed(0)) * scale
        users = torch.cat([users, torch.ones(len(users), 1)], 1)
        items = torch.cat([items, noise], 1)
        vectors = vectors_from_factors(users), vectors_from_factors(items)
        return evaluate_full(heldout, *vectors, self.config.evaluation.k, per_case=per_case)
