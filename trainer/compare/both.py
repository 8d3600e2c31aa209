"""`recpress compare both`: fewer rows of data and fewer rows of table together, from one factorization."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist
from recpress.data import synth as data_synth
from recpress.data.config import SampleConfig
from recpress.data.errors import InputError
from recpress.data.log import open_log
from recpress.modules.frozen import FrozenEmbeddingBagCollection, FrozenTable, Storage, row_bytes
from recpress.modules.rows import round_up
from recpress.modules.shared_als import SharedRows
from recpress.trainer.artifacts import FactorsArtifact, open_factors, shared_artifact
from recpress.trainer.compare.both_report import BothResult, Point, format_both_table, write_both_report
from recpress.trainer.compare.config import CompareBothConfig
from recpress.trainer.config import TrainConfig, chosen_schema
from recpress.trainer.distributed.process_group import agreed, process_group
from recpress.trainer.evaluate.ranking import vectors_from_factors
from recpress.trainer.evaluate.stage import load_heldout, rank_heldout
from recpress.trainer.factorize.config import FactorizeConfig
from recpress.trainer.factorize.stage import factorize
from recpress.trainer.hash.budget import root
from recpress.trainer.hash.config import HashStageConfig
from recpress.trainer.hash.id_maps import SIDES, open_maps
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
    """Rows as stored and maps."""
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
        with shared_artifact(config.out, COMPARISON, meta, overwrite=config.overwrite) as tmp:
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
        with agreed():
            if config.data is None and dist.get_rank() == 0:
                data_synth.synth(config.synth, self.path)
        with agreed():
            self.log = open_log(self.path, chosen_schema(config.schema))
            if self.log.test is None and self.log.test_negatives is None:
                raise InputError(f"{self.path}: no held-out rows (test or test_negatives), which a comparison needs")
        self.metrics = tuple(f"{name}@{config.evaluation.k[0]}" for name in config.metrics)
        self.ids = self.log.num_users + self.log.num_items

    def all(self) -> BothResult:
        found: dict[tuple[float, float], list[dict[str, float]]] = {}
        facts: dict[tuple[float, float], tuple[str, int, int, int, float]] = {}
        for seed in self.config.seeds:
            for rate in self.config.rates or (0.0,):
                factors = self._factorize(seed, rate)
                forms = self._forms(factors, seed, rate)
                for form in forms:
                    words = _words(form, self.ids)
                    if rate == (self.config.rates or (0.0,))[0]:
                        alone = self._alone(form)
                        found.setdefault((form.level, 0.0), []).append(alone)
                        facts[form.level, 0.0] = (words, form.rows, form.bytes, 0, form.error)
                        _say(f"seed {seed}, {words}: factors alone {self._shown(alone)}")
                    if not rate:
                        continue
                    metrics, rows_read, size = self._network(form, factors, seed, rate)
                    found.setdefault((form.level, rate), []).append(metrics)
                    facts[form.level, rate] = (words, form.rows, size, rows_read, form.error)
                    _say(f"seed {seed}, {words}, {rate:.0%} of the rows: {self._shown(metrics)}")
        points = tuple(
            Point(
                level=level,
                form=facts[level, rate][0],
                rate=rate,
                rows=facts[level, rate][1],
                bytes=facts[level, rate][2],
                rows_read=facts[level, rate][3],
                error=facts[level, rate][4],
                metrics={name: tuple(run[name] for run in runs) for name in self.metrics},
            )
            for (level, rate), runs in found.items()
        )
        return self._result(points)

    def _factorize(self, seed: int, rate: float) -> FactorsArtifact:
        path = str(self.folder / f"factors-{seed}-{rate}")
        with _quiet():
            factorize(
                FactorizeConfig(
                    data=self.path,
                    out=path,
                    schema=self.config.schema,
                    als=replace(self.config.als, seed=seed),
                    crossfit_rate=rate if rate < 1 else 0.0,
                    crossfit_seed=seed,
                    device=self.config.device,
                )
            )
        with agreed():
            return open_factors(path, self.log)

    def _forms(self, factors: FactorsArtifact, seed: int, rate: float) -> list[Form]:
        """For each level the storage, and with it the number of rows, that keeps the vectors best."""
        tables = [torch.from_numpy(factors.table(side)[0 : self.log.num_ids(side)]) for side in SIDES]
        counts = [torch.from_numpy(factors.counts(side)[0 : self.log.num_ids(side)])[:, 0] for side in SIDES]
        roots = [root(tables[1].T @ tables[1]), root(tables[0].T @ tables[0])]
        dim = round_up(factors.dim)
        full = 4 * dim * self.ids
        forms = []
        for level in sorted(self.config.levels, reverse=True):
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
                        path = str(self.folder / f"maps-{seed}-{rate}-{level}-{storage}")
                        with _quiet():
                            make_maps(
                                HashStageConfig(
                                    data=self.path,
                                    out=path,
                                    factors=factors.path,
                                    schema=self.config.schema,
                                    rows=rows,
                                    method="learned",
                                    ways=2,
                                    power=self.config.power,
                                    seed=seed,
                                )
                            )
                        candidates.append(self._form(level, storage, path, tables, counts, roots))
            if not candidates:
                raise InputError(f"levels: {level} of the full tables' bytes does not hold the maps; expected more")
            forms.append(min(candidates, key=lambda form: form.error))
        return forms

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
        vectors, rows, size, lost, weight = [], 0, 0, 0.0, 0.0
        for side, table, count, turn in zip(SIDES, tables, counts, roots, strict=True):
            if hashed is None:
                read = _stored(table, storage)
                rows, size = rows + len(table), size + len(table) * row_bytes(storage, round_up(table.shape[1]))
            else:
                id_map, source = hashed.map(side), hashed.rows(side)
                assert source is not None
                stored = _stored(torch.from_numpy(np.array(source[0 : id_map.num_rows])), storage)
                read = SharedRows(id_map).expand(stored)
                rows += id_map.num_rows
                size += id_map.num_rows * row_bytes(storage, round_up(table.shape[1])) + id_map.nbytes
            w = count.double().clamp_min(0.1) ** self.config.power
            lost += float(((((read - table) @ turn).square().sum(1)) * w).sum())
            weight += float((((table @ turn).square().sum(1)) * w).sum())
            vectors.append(read)
        return Form(
            level=level, storage=storage, hash=path, rows=rows, bytes=size, error=lost / weight,
            vectors=cast(tuple[torch.Tensor, torch.Tensor], tuple(vectors)),
        )  # fmt: skip

    def _alone(self, form: Form) -> dict[str, float]:
        heldout = load_heldout(self.log, self.config.evaluation)
        users, items = (vectors_from_factors(table) for table in form.vectors)
        return rank_heldout(heldout, users, items, self.config.evaluation, torch.device("cpu"))

    def _network(
        self, form: Form, factors: FactorsArtifact, seed: int, rate: float
    ) -> tuple[dict[str, float], int, int]:
        network = self.config.frozen
        settings = {name: getattr(network, name) for name in network.__dataclass_fields__}
        tables = replace(network.model.tables, strategy="init-freeze", storage=form.storage)
        settings["model"] = replace(network.model, tables=tables)
        settings["stream"] = replace(network.stream, seed=seed)
        settings["negatives"] = replace(network.negatives, seed=seed)
        with _quiet():
            trained = train(
                TrainConfig(
                    **settings,
                    data=self.path,
                    out=str(self.folder / f"model-{seed}-{rate}-{form.level}"),
                    factors=factors.path,
                    hash=form.hash,
                    schema=self.config.schema,
                    sample=SampleConfig(rate=rate, seed=seed),
                    # factors that have seen all rows leave none to choose an epoch on
                    evaluation=replace(self.config.evaluation, every=None if rate < 1 else 0),
                    seed=seed,
                    tensorboard=False,
                    device=self.config.device,
                )
            )
        return trained.metrics, trained.rows, trained.table_bytes + trained.map_bytes

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
            full_bytes=4 * round_up(config.als.factors or 0) * self.ids,
            total_rows=log.train.num_rows,
            data={
                "log": name,
                "users": log.num_users,
                "items": log.num_items,
                "rows of train": log.train.num_rows,
                "dimension": config.als.factors,
                "seeds": ", ".join(map(str, config.seeds)),
                "ranks": dist.get_world_size(),
            },
            notes=(
                "One factorization of the full log makes the tables, the maps and the cross-fitted factors. At each "
                "level of bytes the storage (32, 16, 8 or 4 bits) and the number of rows are those with the least "
                "weighted distortion of the vectors, in units of the scores; no held-out row is looked at. Where rows "
                "are fewer than ids, an id is the weighted sum of two rows.",
                "Bytes count rows with their scales, maps bit-packed with their weights, and for networks the tables "
                "of counts besides. Networks are trained on frozen tables, on the share of the rows that is given.",
            ),
            config=asdict(config),
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


def _say(text: str) -> None:
    if dist.get_rank() == 0:
        print(text, flush=True)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with open(os.devnull, "w", encoding="utf-8") as nowhere, contextlib.redirect_stdout(nowhere):
        yield
