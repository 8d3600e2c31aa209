"""`recpress compare both`: fewer rows of data and fewer rows of table together, from one factorization."""

from __future__ import annotations

import contextlib
import math
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist

from recpress.data.config import SampleConfig
from recpress.data.dataset.log import open_log
from recpress.data.errors import InputError
from recpress.data.ingest import split as holdout
from recpress.data.synthetic import interactions as data_synth
from recpress.modules.frozen.collection import FrozenEmbeddingBagCollection
from recpress.modules.frozen.kernel import FrozenTable, Storage, row_bytes
from recpress.modules.hashing.map_matrix import MapMatrix
from recpress.modules.row_source import round_up
from recpress.trainer.artifacts.factors import FactorsArtifact, open_factors, shared_artifact
from recpress.trainer.artifacts.id_maps import SIDES, open_maps
from recpress.trainer.compare.both_report import BothResult, Point, format_both_table, write_both_report
from recpress.trainer.compare.config import CompareBothConfig
from recpress.trainer.compare.progress import UnitProgress
from recpress.trainer.config import EvaluationConfig, TrainConfig, chosen_schema
from recpress.trainer.distributed.process_group import process_group
from recpress.trainer.distributed.rank_errors import raise_on_all_ranks
from recpress.trainer.evaluate.ranking import vectors_from_factors
from recpress.trainer.evaluate.stage import load_heldout, rank_heldout
from recpress.trainer.factorize.config import FactorizeConfig
from recpress.trainer.factorize.stage import factorize
from recpress.trainer.hash.budget import root
from recpress.trainer.hash.config import HashStageConfig
from recpress.trainer.hash.stage import make_maps
from recpress.trainer.train.stage import train
from recpress.trainer.versions import versions

COMPARISON = "comparison"
STORAGES: tuple[Storage, ...] = ("fp32", "fp16", "int8", "int4")


@dataclass(frozen=True, kw_only=True)
class Form:
    """How the id tables are stored at one level of bytes."""

    level: float
    """Bytes aimed at, as a share of those of the full tables in float32."""
    storage: Storage
    hash: str | None
    """Folder of the maps; None: a row for each id."""
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
    """What is read back of the users' and the items' vectors, (ids, d)."""


def compare_both(config: CompareBothConfig) -> BothResult:
    """Run all levels of bytes and rates of rows; print the table, write `report.html` and `result.json`.

    Raises:
        InputError: the log has no held-out rows; settings that cannot be used; `out` exists.
    """
    if not config.seeds or not config.levels:
        raise InputError("seeds and levels: expected at least one of each")
    with process_group(config.device) as ranks:
        meta: dict[str, Any] = {"config": asdict(config)}
        with shared_artifact(config.out, COMPARISON, meta, overwrite=config.overwrite, inputs=[config.data]) as tmp:
            result = _Comparison(config, tmp, ranks.device).all()
            if ranks.rank == 0:
                result.save(tmp / "result.json")
                write_both_report(tmp / "report.html", result)
        if ranks.rank == 0:
            print(f"\n{format_both_table(result)}\n\nreport: {config.out}/report.html")
    return result


class _Comparison:
    def __init__(self, config: CompareBothConfig, folder: Path, device: torch.device) -> None:
        self.config, self.folder, self.device = config, folder, device
        self.path = config.data or str(folder / "log")
        with raise_on_all_ranks():
            if config.data is None and dist.get_rank() == 0:
                data_synth.synth(config.synth, self.path)
        with raise_on_all_ranks():
            self.log = open_log(self.path, chosen_schema(config.schema))
            if self.log.test is None and self.log.test_negatives is None:
                raise InputError(f"{self.path}: no held-out rows (test or test_negatives), which a comparison needs")
        self.metrics = tuple(f"{name}@{config.evaluation.k[0]}" for name in config.metrics)
        self.ids = self.log.num_users + self.log.num_items
        self.dim = 0
        """Of the vectors; known with the first factorization."""
        self.als = config.als
        """With what the first factorization chose, by the protocol that ranks."""
        if config.evaluation.protocol == "full" and self.als.auto_metric == "auto":
            self.als = replace(self.als, auto_metric="full")
        self.warnings: list[str] = []
        """Signs that a factorization collapsed."""

    def all(self) -> BothResult:
        rates = self.config.rates or (0.0,)
        networks = len(self.config.rates)
        seeds, levels = len(self.config.seeds), len(self.config.levels)
        choices = networks if self.config.choose else 0
        units = {
            "factorize": choices + seeds * len(rates),
            "choose": choices,
            "tables": seeds * len(rates) * levels,
            "rank": seeds * levels,
            "network": seeds * networks * levels,
        }
        self.found: dict[tuple[float, float], list[dict[str, float]]] = {}
        self.facts: dict[tuple[float, float], dict[str, Any]] = {}
        with UnitProgress("compare both", units, shown=dist.get_rank() == 0) as self.progress:
            self.epochs = {rate: self._choose(rate) for rate in self.config.rates}
            for seed in self.config.seeds:
                for rate in rates:
                    factors = self._factorize(self.path, f"{seed}-{rate}", seed, rate)
                    for form in self._forms(factors, seed, rate):
                        self._rank_form(form, factors, seed, rate, show_alone=rate == rates[0])
        points = tuple(
            Point(
                level=level,
                rate=rate,
                metrics={name: tuple(run[name] for run in runs) for name in self.metrics},
                **self.facts[level, rate],
            )
            for (level, rate), runs in self.found.items()
        )
        return self._result(points)

    def _rank_form(self, form: Form, factors: FactorsArtifact, seed: int, rate: float, *, show_alone: bool) -> None:
        """Rank the held-out rows with the vectors of one form alone, and with a network on its tables."""
        words, epochs = _words(form, self.ids), self.epochs.get(rate, 0)
        if show_alone or (rate and not epochs):
            with self.progress.unit("rank", f"{words}, seed {seed}: factors alone"):
                alone = self._alone(form)
        if show_alone:
            self._add(form, 0.0, alone, bytes=form.bytes, rows_read=0, epochs=0)
            self.progress.say(f"seed {seed}, {words}: factors alone {self._shown(alone)}")
        if not rate:
            return
        if epochs:
            with self.progress.unit("network", f"{words}, seed {seed}: network on {rate:.0%} of the rows"):
                metrics, size, rows_read = self._network(form, factors, seed, rate)
        else:  # the network before its first step ranks as the factors do
            metrics, size, rows_read = alone, form.bytes, 0
            self.progress.skip("network", 1)
        self._add(form, rate, metrics, bytes=size, rows_read=rows_read, epochs=epochs)
        self.progress.say(f"seed {seed}, {words}, {rate:.0%} of the rows: {self._shown(metrics)}")

    def _add(self, form: Form, rate: float, metrics: dict[str, float], **facts: int) -> None:
        """Add one seed's metrics to a point."""
        key = form.level, rate
        self.found.setdefault(key, []).append(metrics)
        self.facts[key] = {
            "form": _words(form, self.ids),
            "rows": form.rows,
            "error": form.error,
            "serving_bytes": facts["bytes"] - form.map_bytes + form.serving_map_bytes,
            **facts,
        }

    def _choose(self, rate: float) -> int:
        """Epochs of the networks on this share of the rows, 0 to those configured.

        They are the best on one row a user that is held out of train, with full tables and the first seed. Epoch 0 is
        the factors' own ranking: where no epoch ranks better, no network is trained.
        """
        config, seed = self.config, self.config.seeds[0]
        if not config.choose:
            return config.frozen.epochs
        path = str(self.folder / "choose" / "log")
        full = config.evaluation.protocol == "full" or self.log.test_negatives is None
        with raise_on_all_ranks():
            if dist.get_rank() == 0 and not Path(path).exists():
                negatives = 0 if full else 99
                holdout.leave_one_out(self.log, path, by="random", seed=seed, negatives=negatives)
        factors = self._factorize(path, f"choose-{rate}", seed, rate)
        evaluation = replace(config.evaluation, every=1, validation="test")  # the held-out part of the split log
        with self.progress.unit("choose", f"epochs of the network on {rate:.0%} of the rows"), _quiet():
            trained = train(self._training(path, factors.path, f"choose-{rate}", seed, rate, evaluation))
        epochs = trained.best_epoch or 0
        self.progress.say(
            f"network on {rate:.0%} of the rows: best of {config.frozen.epochs} epochs is {epochs}"
            + ("" if epochs else ", the factors' own ranking: no network is trained")
        )
        return epochs

    def _factorize(self, log: str, name: str, seed: int, rate: float) -> FactorsArtifact:
        path = str(self.folder / f"factors-{name}")
        with self.progress.unit("factorize", f"factorization, {name}"), _quiet():
            result = factorize(
                FactorizeConfig(
                    data=log,
                    out=path,
                    schema=self.config.schema,
                    als=replace(self.als, seed=seed),
                    crossfit_rate=rate if rate < 1 else 0.0,
                    crossfit_seed=seed,
                    device=self.config.device,
                )
            )
        with raise_on_all_ranks():
            factors = open_factors(path, self.log)
        self.dim = factors.dim
        if self.als.auto and result.auto is not None:  # once: all seeds and rates compare the same tables
            self.als = replace(self.als, auto=False, **result.auto["settings"])
            shown = ", ".join(f"{setting} {value:g}" for setting, value in result.auto["settings"].items())
            self.progress.say(f"factorization: chose {shown}")
        self.warnings += [text for text in result.checks["warnings"] if text not in self.warnings]
        return factors

    def _forms(self, factors: FactorsArtifact, seed: int, rate: float) -> Iterator[Form]:
        """For each level the storage, and with it the number of rows, with the least distortion of the vectors."""
        tables = [torch.from_numpy(factors.table(side)[0 : self.log.num_ids(side)]) for side in SIDES]
        counts = [torch.from_numpy(factors.counts(side)[0 : self.log.num_ids(side)])[:, 0] for side in SIDES]
        roots = [root(tables[1].T @ tables[1]), root(tables[0].T @ tables[0])]
        for level in sorted(self.config.levels, reverse=True):
            with self.progress.unit("tables", f"tables of {level:.3g} of the bytes, seed {seed}"):
                form = self._best_form(level, factors, tables, counts, roots, f"maps-{seed}-{rate}-{level}", seed)
            yield form

    def _best_form(
        self,
        level: float,
        factors: FactorsArtifact,
        tables: list[torch.Tensor],
        counts: list[torch.Tensor],
        roots: list[torch.Tensor],
        name: str,
        seed: int,
    ) -> Form:
        dim = round_up(factors.dim)
        full = 4 * dim * self.ids
        candidates = []
        for storage in STORAGES:
            size = row_bytes(storage, dim)
            if size * self.ids <= level * full * 1.0001:
                candidates.append(self._form(level, storage, None, tables, counts, roots))
                break  # a row for each id, in the most bits that the level holds
            if storage in ("int8", "int4"):
                # a pair of rows and its two weights: about 8 bytes an id of map
                rows = int((level * full - 8 * self.ids) // size)
                if rows >= 2:
                    path = str(self.folder / f"{name}-{storage}")
                    with _quiet():
                        make_maps(
                            HashStageConfig(
                                data=self.path,
                                out=path,
                                factors=factors.path,
                                schema=self.config.schema,
                                rows=rows,
                                method="learned",
                                rows_per_id=2,
                                count_exponent=self.config.count_exponent,
                                seed=seed,
                            )
                        )
                    candidates.append(self._form(level, storage, path, tables, counts, roots))
        if not candidates:
            raise InputError(f"levels: {level} of the full tables' bytes does not hold the maps; expected more")
        return min(candidates, key=lambda form: form.error)

    def _form(
        self,
        level: float,
        storage: Storage,
        path: str | None,
        tables: list[torch.Tensor],
        counts: list[torch.Tensor],
        roots: list[torch.Tensor],
    ) -> Form:
        hashed = None if path is None else open_maps(path, self.log)
        vectors, rows, size, maps, served, lost, weight = [], 0, 0, 0, 0, 0.0, 0.0
        for side, table, count, turn in zip(SIDES, tables, counts, roots, strict=True):
            if hashed is None:
                read = _stored(table, storage)
                rows, size = rows + len(table), size + len(table) * row_bytes(storage, round_up(table.shape[1]))
            else:
                id_map, source = hashed.map(side), hashed.rows(side)
                assert source is not None
                stored = _stored(torch.from_numpy(np.array(source[0 : id_map.num_rows])), storage)
                read = MapMatrix(id_map).expand(stored)
                rows += id_map.num_rows
                size += id_map.num_rows * row_bytes(storage, round_up(table.shape[1])) + id_map.nbytes
                maps += id_map.nbytes
                served += id_map.rows.nbytes + (0 if id_map.weights is None else id_map.weights.nbytes)
            w = count.double().clamp_min(0.1) ** self.config.count_exponent
            lost += float(((((read - table) @ turn).square().sum(1)) * w).sum())
            weight += float((((table @ turn).square().sum(1)) * w).sum())
            vectors.append(read)
        return Form(
            level=level, storage=storage, hash=path, rows=rows, bytes=size, map_bytes=maps, serving_map_bytes=served,
            error=lost / weight if weight else 0.0 if not lost else math.inf,
            vectors=cast(tuple[torch.Tensor, torch.Tensor], tuple(vectors)),
        )  # fmt: skip

    def _alone(self, form: Form) -> dict[str, float]:
        heldout = load_heldout(self.log, self.config.evaluation)
        users, items = (vectors_from_factors(table) for table in form.vectors)
        return rank_heldout(heldout, users, items, self.config.evaluation, torch.device("cpu"))

    def _network(
        self, form: Form, factors: FactorsArtifact, seed: int, rate: float
    ) -> tuple[dict[str, float], int, int]:
        """(metrics of the held-out rows, bytes of tables and maps, rows that were trained on)."""
        config = self._training(
            self.path, factors.path, f"model-{seed}-{rate}-{form.level}", seed, rate,
            replace(self.config.evaluation, every=0, every_steps=0), form=form, stop_after=self.epochs[rate],
        )  # fmt: skip
        with _quiet():
            trained = train(config)
        return trained.metrics, trained.table_bytes + trained.map_bytes, trained.rows

    def _training(
        self,
        log: str,
        factors: str,
        name: str,
        seed: int,
        rate: float,
        evaluation: EvaluationConfig,
        *,
        form: Form | None = None,
        stop_after: int = 0,
    ) -> TrainConfig:
        """How a network is trained; without `form` on full float32 tables."""
        network = self.config.frozen
        settings = {name: getattr(network, name) for name in network.__dataclass_fields__}
        storage = form.storage if form is not None else "fp32"
        tables = replace(network.model.tables, strategy="frozen", storage=storage)
        settings["model"] = replace(network.model, tables=tables)
        settings["stream"] = replace(network.stream, seed=seed)
        settings["negatives"] = replace(network.negatives, seed=seed)
        return TrainConfig(
            **settings,
            data=log,
            out=str(self.folder / name),
            factors=factors,
            hash=form.hash if form is not None else None,
            schema=self.config.schema,
            sample=SampleConfig(rate=rate, seed=seed),
            evaluation=evaluation,
            seed=seed,
            tensorboard=False,
            stop_after=stop_after,
            device=self.config.device,
        )

    def _shown(self, metrics: dict[str, float]) -> str:
        return ", ".join(f"{name} {metrics[name]:.4f}" for name in self.metrics)

    def _result(self, points: tuple[Point, ...]) -> BothResult:
        config, log = self.config, self.log
        made = config.data is None
        name = "made by recpress synth" if made else Path(config.data or "").name
        return BothResult(
            title="Fewer rows of data, fewer bytes of table" + (" on a made log" if made else f" on {name}"),
            points=points,
            metrics=self.metrics,
            full_bytes=4 * round_up(self.dim) * self.ids,
            total_rows=log.train.num_rows,
            data={
                "log": name,
                "users": log.num_users,
                "items": log.num_items,
                "rows of train": log.train.num_rows,
                "dimension": self.dim,
                "seeds": ", ".join(map(str, config.seeds)),
                "ranks": dist.get_world_size(),
            },
            notes=(
                *(f"Warning: {text}." for text in self.warnings),
                "One factorization of the full log makes the tables, the maps and the cross-fitted factors. At each "
                "level of bytes the storage (32, 16, 8 or 4 bits) and the number of rows are those with the least "
                "weighted distortion of the vectors, in units of the scores; no held-out row is looked at. Where rows "
                "are fewer than ids, an id is the weighted sum of two rows.",
                "Stored bytes count rows with their scales, maps bit-packed with their weights, and for networks the "
                "tables of counts. Bytes at serving count maps as `LearnedHash` holds them, with int32 row numbers. "
                "Networks are trained on frozen tables, on the share of the rows that is given. "
                + (
                    f"Their number of epochs is the best of 0 to {config.frozen.epochs} on one random row of each user "
                    f"that was held out of train, chosen with full tables and seed {config.seeds[0]}; 0 is the "
                    "factors' own ranking."
                    if config.choose
                    else "Their number of epochs is the configured one."
                ),
                "= marks a metric that is within noise of that of full tables: two standard errors of the difference "
                "of the same seeds; with one seed nothing is marked.",
            ),
            config=asdict(replace(config, als=self.als)),
            versions=versions(),
            command="recpress " + " ".join(sys.argv[1:]),
        )


def _stored(table: torch.Tensor, storage: Storage) -> torch.Tensor:
    """What a frozen table of this storage gives back of float32 vectors, (n, d)."""
    dim = round_up(table.shape[1])
    frozen = FrozenEmbeddingBagCollection(
        [FrozenTable(name="t", rows=len(table), dim=dim, features=("t",), storage=storage)]
    )
    frozen.load("t", table)
    ((_, decoded),) = frozen.decoded("t")
    return decoded[:, : table.shape[1]].clone()


def _words(form: Form, ids: int) -> str:
    """`int8, 78 % of the rows`."""
    bits = {"fp32": "32-bit", "fp16": "16-bit", "int8": "8-bit", "int4": "4-bit"}[form.storage]
    return f"{bits} rows, a row an id" if form.hash is None else f"{bits} rows, {form.rows / ids:.0%} of the ids"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with open(os.devnull, "w", encoding="utf-8") as nowhere, contextlib.redirect_stdout(nowhere):
        yield
