"""`recpress compare hash`: all hashing methods side by side, with one backbone and one budget of rows."""

from __future__ import annotations

import os
import statistics
import sys
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from recpress.data.dataset import artifact
from recpress.data.dataset.log import open_log
from recpress.data.errors import InputError
from recpress.data.synthetic import interactions as data_synth
from recpress.modules.als.checks import check_factors
from recpress.modules.als.exchange import Exchange
from recpress.modules.als.factorization import ALS
from recpress.modules.als.factors import Factors
from recpress.modules.als.interactions import InteractionBuilder
from recpress.modules.config import ALSConfig, ALSParameters, HashConfig, HashMethod
from recpress.modules.hashing.budget import split_rows
from recpress.modules.hashing.id_map import IdMap
from recpress.modules.hashing.methods import JOINT_METHODS, build_map
from recpress.modules.hashing.shared_als import SharedALS
from recpress.modules.hashing.table_stats import TableStats
from recpress.modules.row_source import round_up
from recpress.trainer.compare.config import CompareHashConfig
from recpress.trainer.compare.hash_report import (
    HashMethodResult,
    HashResult,
    Ranking,
    format_hash_tables,
    write_hash_report,
)
from recpress.trainer.compare.progress import UnitProgress
from recpress.trainer.compare.ties import all_differences
from recpress.trainer.compare.trials import Choice, search
from recpress.trainer.config import chosen_schema
from recpress.trainer.evaluate.heldout import FullHeldout, Pairs, full_from_pairs, read_pairs
from recpress.trainer.evaluate.ranking import evaluate_full, vectors_from_factors
from recpress.trainer.hash.budget import root
from recpress.trainer.versions import versions

COMPARISON = "comparison"
IDS, CRITERION = -1.0, -2.0
"""Shares of the budget for the users: in proportion to the ids; by `split_rows`."""

NAMES = {
    "modulo": ("Modulo", "id mod rows: the hashing trick."),
    "universal": ("Universal hash", "The hashing trick with a hash that mixes."),
    "double": ("Double hash", "The sum of two hashed rows."),
    "frequency": ("Frequency", "The most frequent ids have rows of their own, the rest share by modulo."),
    "hybrid": ("Hybrid", "The most frequent ids have rows of their own, the rest share by double hash."),
    "quotient-remainder": (
        "Quotient-remainder",
        "The sum of a row by quotient and one by remainder (Shi et al.).",
    ),
    "louvain": ("Louvain (GraphHash)", "Communities of the interaction graph (GraphHash, WWW 2025)."),
    "co-cluster": ("Co-clustering (BACO)", "Balanced clusters of the interaction graph (BACO, SIGIR 2026)."),
    "cluster": ("Cluster", "k-means of the factors, without the counts."),
    "learned": ("Learned, one row", "Clusters of the factors, weighted by the counts; rows go where they pay."),
    "learned-2": ("Learned", "Two weighted rows an id, from factors and counts together."),
}
LOCAL = ("cluster", "learned", "learned-2")
"""Methods that are made from the factors."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What is chosen for a method on the validation rows."""

    hash: HashConfig
    user_share: float = IDS
    """Share of the rows that users have; or IDS, CRITERION."""
    sweeps: int = 1
    """Sweeps of the factorization with shared rows, from the rows that are nearest to the full factors."""

    def words(self) -> dict[str, Any]:
        """For reports: what was chosen, by name."""
        names = {IDS: "by ids", CRITERION: "by distortion"}
        chosen: dict[str, Any] = {}
        if self.hash.method not in JOINT_METHODS:
            chosen["users' share of rows"] = names.get(self.user_share, self.user_share)
        if self.hash.method in ("frequency", "hybrid"):
            chosen["exclusive_share"] = self.hash.exclusive_share
        if self.hash.method in ("learned", "co-cluster"):
            chosen["count_exponent"] = self.hash.count_exponent
        return chosen | {"sweeps": self.sweeps}


@dataclass
class _Made:
    """Vectors that came from shared rows."""

    users: torch.Tensor
    items: torch.Tensor
    maps: tuple[IdMap, IdMap]
    map_seconds: float
    train_seconds: float = 0.0
    rows: int = field(init=False)

    def __post_init__(self) -> None:
        self.rows = sum(m.num_rows for m in self.maps)

    @property
    def map_bytes(self) -> int:
        """Bit-packed, with weights; 0 where formulas do."""
        return sum(m.nbytes for m in self.maps)

    @property
    def serving_map_bytes(self) -> int:
        """As `LearnedHash` serves a map by default: int32 rows and weights; 0 where formulas do."""
        each = (m.rows.nbytes + (0 if m.weights is None else m.weights.nbytes) for m in self.maps if not m.computed)
        return sum(each)


@dataclass
class _Runs:
    """The test runs of one method in one ranking, one a seed."""

    metrics: list[dict[str, float]] = field(default_factory=list)
    by_user: list[np.ndarray] = field(default_factory=list)
    """First metric of each user, (users,) float32."""
    rows: list[int] = field(default_factory=list)
    map_bytes: list[int] = field(default_factory=list)
    serving_map_bytes: list[int] = field(default_factory=list)
    map_seconds: list[float] = field(default_factory=list)
    train_seconds: list[float] = field(default_factory=list)

    def add(self, metrics: dict[str, float], by_user: np.ndarray, made: _Made | None, rows: int) -> None:
        self.metrics.append(metrics)
        self.by_user.append(by_user)
        self.rows.append(rows)
        self.map_bytes.append(made.map_bytes if made else 0)
        self.serving_map_bytes.append(made.serving_map_bytes if made else 0)
        if made:
            self.map_seconds.append(made.map_seconds)
            self.train_seconds.append(made.train_seconds)


@dataclass(frozen=True)
class _Chosen:
    setting: Setting
    trials: int
    exist: int


def compare_hash(config: CompareHashConfig) -> HashResult:
    """Run all methods; print the tables, write `report.html` and `result.json` into `config.out`. One process.

    Raises:
        InputError: the log has no test rows; a budget or a method that cannot be used; `out` exists.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError("compare hash runs on one process: start it without torchrun")
    unknown = [name for name in config.methods if name not in NAMES]
    if unknown:
        raise InputError(f"methods: {unknown[0]!r}, expected some of {', '.join(NAMES)}")
    if not config.seeds or not config.sweeps:
        raise InputError("seeds and sweeps: expected at least one of each")
    meta: dict[str, Any] = {"config": asdict(config)}
    with artifact.writing(config.out, COMPARISON, meta, overwrite=config.overwrite, inputs=[config.data or ""]) as tmp:
        result = _Comparison(config, tmp).all()
        result.save(tmp / "result.json")
        write_hash_report(tmp / "report.html", result)
    print(f"\n{format_hash_tables(result)}\n\nreport: {config.out}/report.html")
    return result


class _Comparison:
    def __init__(self, config: CompareHashConfig, folder: Path) -> None:
        self.config = config
        self.parameters: ALSParameters | None = None  # chosen with the first seed, the same for all
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
        self.csrs = builder.build()
        self.counts = [torch.from_numpy(np.diff(csr.indptr)).float() for csr in self.csrs]
        self.ids = self.log.num_users + self.log.num_items
        self.budget = config.rows or round(config.share * self.ids)
        if not 2 <= self.budget <= self.ids:
            raise InputError(f"rows: a budget of {self.budget}, expected 2 to {self.ids}, the ids of the log")
        self.metrics = tuple(f"{kind}@{k}" for k in config.evaluation.k for kind in ("Recall", "NDCG"))
        self.dim = 0
        """Of the vectors; known with the first factorization."""
        self.chosen_als: dict[str, Any] = {}
        """Settings of the factorization that were open and have been chosen."""
        self.problems: list[str] = []
        """Signs that the factorization collapsed."""

    def all(self) -> HashResult:
        config = self.config
        # at most one run of each seed and method at equal rows and one at equal bytes, besides the trials
        units = {"factorize": len(config.seeds)}
        units |= {method: config.trials + 2 * len(config.seeds) for method in config.methods}
        chosen: dict[str, _Chosen] = {}
        left_out: dict[str, str] = {}
        at_rows: dict[str, _Runs] = {"full": _Runs()}
        at_bytes: dict[str, _Runs] = {"full": at_rows["full"]}
        too_large: dict[str, str] = {}
        with UnitProgress("compare hash", units) as self.progress:
            full = self._full(config.seeds[0])
            for method in config.methods:
                found = self._choose(method, full)
                if isinstance(found, _Chosen):
                    chosen[method] = found
                else:
                    left_out[method] = found
                    self.progress.skip(method, 2 * len(config.seeds))
            if not chosen:
                raise InputError(f"no method can use this budget of rows: {next(iter(left_out.values()))}")
            popularity, _ = self._test(torch.ones(self.log.num_users, 1), self.counts[1][:, None])
            for seed in config.seeds:
                full = self._full(seed) if seed != config.seeds[0] else full
                metrics, by_user = self._test(full.users, full.items)
                self.progress.say(f"seed {seed}: full table: {_shown(metrics)}")
                at_rows["full"].add(metrics, by_user, None, self.ids)
                for method, choice in chosen.items():
                    setting = replace(choice.setting, hash=replace(choice.setting.hash, seed=seed))
                    self._runs(method, setting, full, at_rows, at_bytes, too_large)
        for method in too_large:
            at_bytes.pop(method, None)
        return self._result(chosen, left_out, popularity, at_rows, at_bytes, too_large)

    def _runs(
        self,
        method: str,
        setting: Setting,
        full: Factors,
        at_rows: dict[str, _Runs],
        at_bytes: dict[str, _Runs],
        too_large: dict[str, str],
    ) -> None:
        """The test runs of one seed: at the budget of rows, and at the bytes of these rows."""
        seed, name = setting.hash.seed, NAMES[method][0]
        with self.progress.unit(method, f"{name}, seed {seed}, equal rows"):
            made = self._train(setting, self._map(setting, full, self.budget), full)
            found = self._test(made.users, made.items)
        at_rows.setdefault(method, _Runs()).add(*found, made, made.rows)
        self.progress.say(f"seed {seed}: {name}: {_shown(found[0])}")
        with self.progress.unit(method, f"{name}, seed {seed}, equal bytes"):
            if made.map_bytes:
                smaller = self._map_within_bytes(setting, full, made.map_bytes)
                if isinstance(smaller, str):
                    too_large[method] = smaller
                    self.progress.say(f"seed {seed}: {name}: {smaller}")
                    return
                made = self._train(setting, smaller, full)
                found = self._test(made.users, made.items)
                self.progress.say(f"seed {seed}: {name}, equal bytes ({made.rows:,} rows): {_shown(found[0])}")
        at_bytes.setdefault(method, _Runs()).add(*found, made, made.rows)

    def _held_out(self) -> tuple[FullHeldout, FullHeldout]:
        """Validation rows of some users, train masked; test rows of all, train and validation masked."""
        log, users, items = self.log, self.log.num_users, self.log.num_items
        assert log.test is not None
        if log.val is None:  # one in ten of the train rows chooses
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
        keep, keep_seen = np.isin(val[0], some), np.isin(self.train[0], some)
        part: Pairs = (val[0][keep], val[1][keep])
        masked: Pairs = (self.train[0][keep_seen], self.train[1][keep_seen])
        return full_from_pairs(part, masked, num_users=users, num_items=items), test

    def _full(self, seed: int) -> Factors:
        """Factors of all ids. Settings that are open are chosen with the first seed, for all seeds."""
        chosen: ALSConfig | ALSParameters = self.parameters or self._als()
        with self.progress.unit("factorize", f"factorization, seed {seed}"):
            als = ALS(replace(chosen, seed=seed), self.log.num_users, self.log.num_items)
            als.add(*self.train)
            full = als.fit()
        if self.parameters is None:
            self.parameters, self.dim = als.parameters, full.users.shape[1]
            self.problems = check_factors(full, als)
            if als.choice is not None:
                self.chosen_als = als.choice.settings
                self.progress.say(als.choice.line())
        return full

    def _als(self) -> ALSConfig:
        """Open settings are compared as the methods are: among all items."""
        als = self.config.als
        return replace(als, auto_metric="full") if als.auto_metric == "auto" else als

    def _choose(self, method: str, full: Factors) -> _Chosen | str:
        """The best setting on the validation rows, of as many as every method tries; or why none can be made.

        A setting that a method refuses (too few rows for one of the tables, say) is no trial.
        """
        config, name = self.config, NAMES[method][0]
        maps: dict[Setting, _Made] = {}
        trial = 0

        def measure(choice: Choice) -> float:
            nonlocal trial
            setting = self._setting(method, dict(zip(axes, choice, strict=True)))
            key = replace(setting, sweeps=0)
            with self.progress.unit(method, f"{name}, trial {trial + 1} of {config.trials}"):
                if key not in maps:
                    maps[key] = self._map(setting, full, self.budget)
                made = self._train(setting, maps[key], full)
                trial += 1
                return self._rank(made.users, made.items, self.val)[config.metric]

        axes = self._axes(method)
        found = search(axes, measure, config.trials)
        self.progress.skip(method, config.trials - found.tried)
        if found.best is None:
            self.progress.say(f"{name}: left out: {found.refused}")
            return found.refused
        setting = self._setting(method, dict(zip(axes, found.best, strict=True)))
        words = ", ".join(f"{word} {value}" for word, value in setting.words().items())
        few = "" if found.tried == config.trials else ", all that exist"
        self.progress.say(
            f"{name}: best of {found.tried} settings{few}: {config.metric} {found.value:.4f} of val; {words}"
        )
        return _Chosen(setting, found.tried, found.exist)

    def _axes(self, method: str) -> dict[str, tuple[Any, ...]]:
        """The settings that a method has, by axis; the search starts at the first value of each."""
        config = self.config
        axes: dict[str, tuple[Any, ...]] = {}
        if method not in JOINT_METHODS:
            axes["user_share"] = (IDS, *config.user_shares, *((CRITERION,) if method in LOCAL else ()))
        if method in ("frequency", "hybrid"):
            axes["exclusive_share"] = (0.5, *config.exclusive_shares)
        if method.startswith("learned") or method == "co-cluster":
            axes["count_exponent"] = (config.hash.count_exponent, *config.count_exponents)
        axes["sweeps"] = tuple(sorted(config.sweeps, key=lambda sweeps: abs(sweeps - 1)))
        return axes

    def _setting(self, method: str, values: dict[str, Any]) -> Setting:
        two = method == "learned-2"
        name = cast(HashMethod, "learned" if two else method)
        hashed = replace(
            self.config.hash,
            method=name,
            rows_per_id=2 if two else 1,
            **{axis: values[axis] for axis in ("exclusive_share", "count_exponent") if axis in values},
        )
        return Setting(hash=hashed, user_share=values.get("user_share", IDS), sweeps=values["sweeps"])

    def _map(self, setting: Setting, full: Factors, budget: int) -> _Made:
        began = time.perf_counter()
        tables = self._tables(full)
        if setting.hash.method in JOINT_METHODS:
            maps = JOINT_METHODS[setting.hash.method](*tables, *self.train, budget, setting.hash)
        else:
            rows = self._split(setting, tables, full, budget)
            first, second = (build_map(table, n, setting.hash) for table, n in zip(tables, rows, strict=True))
            maps = (first, second)
        return _Made(full.users, full.items, maps, time.perf_counter() - began)

    def _map_within_bytes(self, setting: Setting, full: Factors, map_bytes: int) -> _Made | str:
        """A map whose rows and own bytes fit into the bytes of `budget` rows; or why there is none.

        Args:
            map_bytes: of the map with `budget` rows, whose row numbers take at least as many bits.
        """
        each = 4 * round_up(self.dim)
        limit = each * self.budget
        for _ in range(4):
            rows = (limit - map_bytes) // each
            if rows < 2:
                return f"does not fit: the map alone takes {map_bytes:,} of {limit:,} bytes"
            try:
                made = self._map(setting, full, rows)
            except ValueError as error:
                return f"does not fit: {error}"
            if made.rows * each + made.map_bytes <= limit:
                return made
            map_bytes += made.rows * each + made.map_bytes - limit  # the rows were split in another way
        return f"does not fit: no number of rows with its map takes at most {limit:,} bytes"

    def _tables(self, full: Factors) -> tuple[TableStats, TableStats]:
        users, items = (
            TableStats(name=name, num_ids=len(vectors), counts=counts, embedding=vectors)
            for name, vectors, counts in zip(("user", "item"), (full.users, full.items), self.counts, strict=True)
        )
        return users, items

    def _split(self, setting: Setting, tables: tuple[TableStats, TableStats], full: Factors, budget: int) -> list[int]:
        users, items = self.log.num_users, self.log.num_items
        if setting.user_share == CRITERION:
            # an error of a vector counts by what it does to the scores: x' Y'Y x of users, and likewise of items
            scaled = [
                replace(table, embedding=vectors @ root(others.T @ others))
                for table, vectors, others in zip(
                    tables, (full.users, full.items), (full.items, full.users), strict=True
                )
            ]
            return split_rows(scaled, budget, setting.hash)
        share = users / (users + items) if setting.user_share == IDS else setting.user_share
        first = min(max(round(share * budget), 1, budget - items), users, budget - 1)
        return [first, budget - first]

    def _train(self, setting: Setting, made: _Made, full: Factors) -> _Made:
        assert self.parameters is not None
        began = time.perf_counter()
        als = SharedALS(replace(self.parameters, sweeps=setting.sweeps), *self.csrs, *made.maps)
        found = als.fit(full.users, full.items)
        seconds = time.perf_counter() - began
        return _Made(found.users, found.items, made.maps, made.map_seconds, seconds)

    def _test(self, users: torch.Tensor, items: torch.Tensor) -> tuple[dict[str, float], np.ndarray]:
        """Metrics of the test rows, and the first one of each user."""
        per_case: dict[str, torch.Tensor] = {}
        metrics = self._rank(users, items, self.test, per_case)
        return metrics, per_case[self.metrics[0]].float().numpy()

    def _rank(
        self,
        users: torch.Tensor,
        items: torch.Tensor,
        heldout: FullHeldout,
        per_case: dict[str, torch.Tensor] | None = None,
    ) -> dict[str, float]:
        """Metrics, with ties broken at random, for ids that share a row tie: a last place of next to no weight."""
        scale = 1e-6 * float((users[:1000] @ items[:1000].T).std())
        noise = torch.rand(len(items), 1, generator=torch.Generator().manual_seed(0)) * scale
        users = torch.cat([users, torch.ones(len(users), 1)], 1)
        items = torch.cat([items, noise], 1)
        vectors = vectors_from_factors(users), vectors_from_factors(items)
        return evaluate_full(heldout, *vectors, self.config.evaluation.k, per_case=per_case)

    def _result(
        self,
        chosen: dict[str, _Chosen],
        left_out: dict[str, str],
        popularity: dict[str, float],
        at_rows: dict[str, _Runs],
        at_bytes: dict[str, _Runs],
        too_large: dict[str, str],
    ) -> HashResult:
        config, log = self.config, self.log
        row_bytes = 4 * round_up(self.dim)

        def ranking(found: dict[str, _Runs]) -> Ranking:
            methods = tuple(_method(key, runs, row_bytes, chosen.get(key)) for key, runs in found.items())
            compressed = {key: runs.by_user for key, runs in found.items() if key != "full"}
            return Ranking(methods=methods, differences=all_differences(compressed))

        return HashResult(
            title="Learned hash functions" + (" on a made log" if config.data is None else f" on {log_name(config)}"),
            rows=ranking(at_rows),
            bytes=ranking(at_bytes),
            byte_budget=row_bytes * self.budget,
            left_out={NAMES[key][0]: why for key, why in left_out.items()},
            too_large={NAMES[key][0]: why for key, why in too_large.items()},
            popularity=popularity,
            problems=tuple(self.problems),
            ours="learned-2" if "learned-2" in chosen else [*chosen][-1],
            full="full",
            metrics=self.metrics,
            data={
                "log": "made by recpress synth" if config.data is None else log_name(config),
                "users": log.num_users,
                "items": log.num_items,
                "rows of train": len(self.train[0]),
                "budget of rows": self.budget,
                "budget of bytes": row_bytes * self.budget,
                "dimension": self.dim,
                "trials of each method": config.trials,
                "seeds": ", ".join(map(str, config.seeds)),
            },
            notes=(
                "The backbone is weighted least squares with a row for each id (full) or with the rows of the map: the "
                "map is made, rows start nearest to the full factors, and sweeps of the same loss follow. The score is "
                "the dot product; an id knows nothing but its row.",
                f"Each method has the setting with the best {config.metric} on validation rows of "
                f"{self.val.num_cases:,} users (seed {config.seeds[0]}), of {config.trials} trials, the same number "
                "for every method; a method with fewer settings tries all of them. Test rows rank among all items; "
                "train and validation items are masked; ties of scores, which ids in one row have, are broken at "
                "random for all methods alike.",
                "Two rankings: at the same number of rows, and at the same bytes, those of the budget of rows without "
                "a map. There a method pays for its map with rows; a formula needs no map. Settings are those chosen "
                "at equal rows. Stored bytes count maps bit-packed with their weights; bytes at serving count them as "
                "`LearnedHash` holds them, with int32 row numbers (with packed=True it holds the stored bytes).",
                f"Methods share a place (=) where their difference in {self.metrics[0]} is within noise: two standard "
                "errors of the paired difference, of the users and of the seeds together.",
            ),
            config=asdict(replace(config, als=replace(config.als, **self.chosen_als))),
            versions=versions(),
            command="recpress " + " ".join(sys.argv[1:]),
        )


def _method(key: str, runs: _Runs, row_bytes: int, chosen: _Chosen | None) -> HashMethodResult:
    name, description = NAMES.get(key, ("Full table", "A row for each id: the ceiling."))
    rows = round(statistics.fmean(runs.rows))
    return HashMethodResult(
        key=key,
        name=name,
        description=description,
        setting=chosen.setting.words() if chosen else {},
        trials=chosen.trials if chosen else 0,
        settings_exist=chosen.exist if chosen else 0,
        metrics=tuple(runs.metrics),
        rows=rows,
        row_bytes=row_bytes * rows,
        map_bytes=round(statistics.fmean(runs.map_bytes)),
        serving_map_bytes=round(statistics.fmean(runs.serving_map_bytes)),
        map_seconds=tuple(runs.map_seconds),
        train_seconds=tuple(runs.train_seconds),
    )


def log_name(config: CompareHashConfig) -> str:
    return Path(config.data or "").name


def _shown(metrics: dict[str, float]) -> str:
    names = [name for name in metrics if name.startswith(("Recall", "NDCG"))]
    return ", ".join(f"{name} {metrics[name]:.4f}" for name in names)
