"""`recpress compare hash`: all hashing methods side by side, with one backbone and one budget of rows."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from recpress.data import artifact
from recpress.data import synth as data_synth
from recpress.data.errors import InputError
from recpress.data.log import open_log
from recpress.modules.als import ALS
from recpress.modules.config import ALSParameters, HashConfig, HashMethod
from recpress.modules.exchange import Exchange
from recpress.modules.factors import Factors
from recpress.modules.hashing.id_map import IdMap
from recpress.modules.hashing.methods import JOINT_METHODS, build_map
from recpress.modules.hashing.problem import IdTable
from recpress.modules.hashing.split import split_rows
from recpress.modules.interactions import InteractionBuilder
from recpress.modules.shared_als import SharedALS
from recpress.trainer.compare.config import CompareHashConfig
from recpress.trainer.compare.hash_report import HashMethodResult, HashResult, format_hash_table, write_hash_report
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
            chosen["private"] = self.hash.private
        if self.hash.method in ("learned", "co-cluster"):
            chosen["power"] = self.hash.power
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


def compare_hash(config: CompareHashConfig) -> HashResult:
    """Run all methods; print the table, write `report.html` and `result.json` into `config.out`. One process.

    Raises:
        InputError: the log has no val or test rows; a budget or a method that cannot be used; `out` exists.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError("compare hash runs on one process: start it without torchrun")
    unknown = [name for name in config.methods if name not in NAMES]
    if unknown:
        raise InputError(f"methods: {unknown[0]!r}, expected some of {', '.join(NAMES)}")
    if not config.seeds or not config.sweeps:
        raise InputError("seeds and sweeps: expected at least one of each")
    meta: dict[str, Any] = {"config": asdict(config)}
    with artifact.writing(config.out, COMPARISON, meta, overwrite=config.overwrite) as tmp:
        result = _Comparison(config, tmp).all()
        result.save(tmp / "result.json")
        write_hash_report(tmp / "report.html", result)
    print(f"\n{format_hash_table(result)}\n\nreport: {config.out}/report.html")
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
        ids = self.log.num_users + self.log.num_items
        self.budget = config.rows or round(config.share * ids)
        if not 2 <= self.budget <= ids:
            raise InputError(f"rows: a budget of {self.budget}, expected 2 to {ids}, the ids of the log")

    def all(self) -> HashResult:
        config = self.config
        settings: dict[str, Setting] = {}
        found: dict[str, list[tuple[dict[str, float], _Made | None]]] = {"full": []}
        full = self._full(config.seeds[0])
        for method in config.methods:
            settings[method] = self._choose(method, full)
        for seed in config.seeds:
            full = self._full(seed) if seed != config.seeds[0] else full
            metrics = self._rank(full.users, full.items, self.test)
            self._say(f"seed {seed}: full table: {_shown(metrics)}")
            found["full"].append((metrics, None))
            for method, setting in settings.items():
                hashed = replace(setting.hash, seed=seed)
                made = self._make(replace(setting, hash=hashed), full)
                metrics = self._rank(made.users, made.items, self.test)
                self._say(f"seed {seed}: {NAMES[method][0]}: {_shown(metrics)}")
                found.setdefault(method, []).append((metrics, made))
        return self._result(settings, found)

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
        chosen = self.config.als if self.parameters is None else self.parameters
        als = ALS(replace(chosen, seed=seed), self.log.num_users, self.log.num_items)
        als.add(*self.train)
        full = als.fit()
        self.parameters = als.parameters
        return full

    def _choose(self, method: str, full: Factors) -> Setting:
        """The best setting on the validation rows: one axis after the other, each from the best so far.

        A setting that a method refuses (too few rows for one of the tables, say) is not chosen.
        """
        setting, best = self._first(method), -1.0
        tried: dict[Setting, float] = {}
        refused: ValueError | None = None
        for axis in self._axes(method):
            made: dict[Any, _Made] = {}
            for other in [setting, *axis(setting)]:
                if other in tried:
                    continue
                made_key = replace(other, sweeps=0)
                if made_key not in made:
                    try:
                        made[made_key] = self._map(other, full)
                    except ValueError as error:
                        refused = error
                        continue
                trained = self._train(other, made[made_key], full)
                tried[other] = self._rank(trained.users, trained.items, self.val)[self.config.metric]
                if tried[other] > best:
                    best, setting = tried[other], other
        if not tried:
            raise InputError(f"{method}: {refused}")
        chosen = ", ".join(f"{word} {value}" for word, value in setting.words().items())
        self._say(f"chose of {len(tried)}: {NAMES[method][0]}: {self.config.metric} {best:.4f} of val; {chosen}")
        return setting

    def _first(self, method: str) -> Setting:
        two = method == "learned-2"
        name = cast(HashMethod, "learned" if two else method)
        hashed = replace(self.config.hash, method=name, ways=2 if two else 1)
        if method in ("frequency", "hybrid"):
            hashed = replace(hashed, private=0.5)
        return Setting(hash=hashed, sweeps=min(self.config.sweeps, key=lambda sweeps: abs(sweeps - 1)))

    def _axes(self, method: str) -> Iterator[Callable[[Setting], list[Setting]]]:
        config = self.config
        if method not in JOINT_METHODS:
            shares = config.user_shares + ((CRITERION,) if method in LOCAL else ())
            yield lambda s: [replace(s, user_share=share) for share in shares]
        if method in ("frequency", "hybrid"):
            yield lambda s: [replace(s, hash=replace(s.hash, private=x)) for x in config.privates]
        if method.startswith("learned") or method == "co-cluster":
            yield lambda s: [replace(s, hash=replace(s.hash, power=x)) for x in config.powers]
        yield lambda s: [replace(s, sweeps=x) for x in config.sweeps]

    def _make(self, setting: Setting, full: Factors) -> _Made:
        return self._train(setting, self._map(setting, full), full)

    def _map(self, setting: Setting, full: Factors) -> _Made:
        began = time.perf_counter()
        tables = self._tables(full)
        if setting.hash.method in JOINT_METHODS:
            maps = JOINT_METHODS[setting.hash.method](*tables, *self.train, self.budget, setting.hash)
        else:
            rows = self._split(setting, tables, full)
            first, second = (build_map(table, n, setting.hash) for table, n in zip(tables, rows, strict=True))
            maps = (first, second)
        return _Made(full.users, full.items, maps, time.perf_counter() - began)

    def _tables(self, full: Factors) -> tuple[IdTable, IdTable]:
        users, items = (
            IdTable(name=name, num_ids=len(vectors), counts=counts, embedding=vectors)
            for name, vectors, counts in zip(("user", "item"), (full.users, full.items), self.counts, strict=True)
        )
        return users, items

    def _split(self, setting: Setting, tables: tuple[IdTable, IdTable], full: Factors) -> list[int]:
        users, items = self.log.num_users, self.log.num_items
        if setting.user_share == CRITERION:
            # an error of a vector counts by what it does to the scores: x' Y'Y x of users, and likewise of items
            scaled = [
                replace(table, embedding=vectors @ root(others.T @ others))
                for table, vectors, others in zip(
                    tables, (full.users, full.items), (full.items, full.users), strict=True
                )
            ]
            return split_rows(scaled, self.budget, setting.hash)
        share = users / (users + items) if setting.user_share == IDS else setting.user_share
        first = min(max(round(share * self.budget), 1, self.budget - items), users, self.budget - 1)
        return [first, self.budget - first]

    def _train(self, setting: Setting, made: _Made, full: Factors) -> _Made:
        assert self.parameters is not None
        began = time.perf_counter()
        als = SharedALS(replace(self.parameters, sweeps=setting.sweeps), *self.csrs, *made.maps)
        found = als.fit(full.users, full.items)
        seconds = time.perf_counter() - began
        return _Made(found.users, found.items, made.maps, made.map_seconds, seconds)

    def _rank(self, users: torch.Tensor, items: torch.Tensor, heldout: FullHeldout) -> dict[str, float]:
        """Metrics, with ties broken at random, for ids that share a row tie: a last place of next to no weight."""
        scale = 1e-6 * float((users[:1000] @ items[:1000].T).std())
        noise = torch.rand(len(items), 1, generator=torch.Generator().manual_seed(0)) * scale
        users = torch.cat([users, torch.ones(len(users), 1)], 1)
        items = torch.cat([items, noise], 1)
        return evaluate_full(
            heldout, vectors_from_factors(users), vectors_from_factors(items), self.config.evaluation.k
        )

    def _say(self, text: str) -> None:
        print(text, flush=True)

    def _result(
        self, settings: dict[str, Setting], found: dict[str, list[tuple[dict[str, float], _Made | None]]]
    ) -> HashResult:
        config, log = self.config, self.log
        dim, ids = config.als.factors or 0, log.num_users + log.num_items
        methods = []
        for key, runs in found.items():
            made = [one for _, one in runs if one is not None]
            name, description = NAMES.get(key, ("Full table", "A row for each id: the ceiling."))
            rows = made[0].rows if made else ids
            methods.append(
                HashMethodResult(
                    key=key,
                    name=name,
                    description=description,
                    setting=settings[key].words() if key in settings else {},
                    metrics=tuple(metrics for metrics, _ in runs),
                    rows=rows,
                    row_bytes=4 * dim * rows,
                    map_bytes=sum(m.nbytes for m in made[0].maps) if made else 0,
                    map_seconds=tuple(one.map_seconds for one in made),
                    train_seconds=tuple(one.train_seconds for one in made),
                )
            )
        return HashResult(
            title="Learned hash functions" + (" on a made log" if config.data is None else f" on {log_name(config)}"),
            methods=tuple(methods),
            ours="learned-2" if "learned-2" in settings else methods[-1].key,
            full="full",
            metrics=tuple(f"{kind}@{k}" for k in config.evaluation.k for kind in ("Recall", "NDCG")),
            data={
                "log": "made by recpress synth" if config.data is None else log_name(config),
                "users": log.num_users,
                "items": log.num_items,
                "rows of train": len(self.train[0]),
                "budget of rows": self.budget,
                "dimension": dim,
                "seeds": ", ".join(map(str, config.seeds)),
            },
            notes=(
                "The backbone is weighted least squares with a row for each id (full) or with the rows of the map: the "
                "map is made, rows start nearest to the full factors, and sweeps of the same loss follow. The score is "
                "the dot product; an id knows nothing but its row.",
                f"Each method has the setting with the best {config.metric} on validation rows of "
                f"{self.val.num_cases:,} users (seed {config.seeds[0]}), chosen axis by axis. Test rows rank "
                "among all items; train and validation items are masked; ties, which ids in one row have, are broken "
                "at random for all methods alike.",
            ),
            config=asdict(config),
            versions=versions(),
            command="recpress " + " ".join(sys.argv[1:]),
        )


def log_name(config: CompareHashConfig) -> str:
    return Path(config.data or "").name


def _shown(metrics: dict[str, float]) -> str:
    names = [name for name in metrics if name.startswith(("Recall", "NDCG"))]
    return ", ".join(f"{name} {metrics[name]:.4f}" for name in names)
