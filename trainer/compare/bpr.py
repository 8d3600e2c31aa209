"""Bayesian personalized ranking by the library `implicit`: a peer that is no network, for logs of up to a few million
examples."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from recpress.data.dataset.log import Log
from recpress.data.sampling.scan import iter_columns
from recpress.trainer.compare.cadc_result import CurvePoint, MethodResult, SeedResult
from recpress.trainer.compare.config import CompareCadcConfig
from recpress.trainer.distributed.collectives import all_reduce
from recpress.trainer.distributed.rank_errors import raise_on_all_ranks
from recpress.trainer.evaluate.ranking import vectors_from_factors
from recpress.trainer.evaluate.stage import load_heldout, rank_heldout

INSTALL = "pip install implicit, or scripts/install.sh .venv bench"
MAX_ROWS = 2_000_000
TRIALS: tuple[dict[str, float], ...] = (
    {"learning_rate": 0.01, "regularization": 0.01},
    {"learning_rate": 0.05, "regularization": 0.01},
    {"learning_rate": 0.05, "regularization": 0.05},
)
"""The first are the library's own defaults."""
ITERATIONS, EVALUATE_EVERY = 100, 10


@dataclass(frozen=True)
class BPRPoint:
    """Vectors after some iterations."""

    iterations: int
    seconds: float
    """Reading the log and fitting so far."""
    users: np.ndarray
    """(users, factors + 1) float32; the last column meets the items' bias."""
    items: np.ndarray
    """(items, factors + 1) float32."""


def installed() -> bool:
    """Whether `implicit` and its dependencies can be imported."""
    try:
        import implicit.cpu.bpr  # noqa: F401
        import scipy.sparse  # noqa: F401
    except ImportError:
        return False
    return True


def fit_bpr(
    log: Log, settings: dict[str, float], *, factors: int, iterations: int, every: int = 0, seed: int = 0
) -> list[BPRPoint]:
    """Fit the train examples of a log, on this rank alone.

    Args:
        every: iterations between two points; 0: only the last one.
    """
    from implicit.cpu.bpr import BayesianPersonalizedRanking
    from scipy.sparse import csr_matrix

    begin = time.monotonic()
    schema = log.schema
    columns = [(data[schema.user], data[schema.item]) for data in iter_columns(log.train, [schema.user, schema.item])]
    users, items = (np.concatenate([np.asarray(pair[side]) for pair in columns]) for side in (0, 1))
    ones = np.ones(len(users), np.float32)
    matrix = csr_matrix((ones, (users, items)), shape=(log.num_users, log.num_items))
    points: list[BPRPoint] = []
    copying = 0.0

    def take(iteration: int, *_: Any) -> None:
        nonlocal copying
        now = time.monotonic()
        done = iteration + 1
        if done == iterations or (every and done % every == 0):
            vectors = (np.array(side, np.float32) for side in (model.user_factors, model.item_factors))
            points.append(BPRPoint(done, now - begin - copying, *vectors))
        copying += time.monotonic() - now

    model = BayesianPersonalizedRanking(
        factors=factors,
        iterations=iterations,
        num_threads=torch.get_num_threads(),
        random_state=seed,
        learning_rate=settings["learning_rate"],
        regularization=settings["regularization"],
    )
    model.fit(matrix, show_progress=False, callback=take)
    return points


class BPRMethod:
    """The peer in `compare cadc`: as many trials as the networks, iterations chosen on the same validation examples."""

    key, name = "bpr", "BPR (implicit)"

    def __init__(self, config: CompareCadcConfig, folder: Path, log: Log) -> None:
        self.config, self.folder, self.log = config, folder, log
        self.available = bool(all_reduce(torch.tensor(int(installed())), dist.ReduceOp.MIN))
        self.curve: tuple[CurvePoint, ...] = ()
        self._best, self._settings, self._iterations = -math.inf, TRIALS[0], ITERATIONS
        self._dim = int(config.random.model.tables.dim)
        self._seeds: list[SeedResult] = []

    def trial(self, log: Log, number: int, seed: int) -> str:
        """Try one set of settings, and remember it if it is the best so far; returns the result in words."""
        metric = self.config.evaluation.metric
        found = self._ranked(log, TRIALS[number], ITERATIONS, EVALUATE_EVERY, seed)
        curve = tuple(CurvePoint(seconds=s, epoch=n, metrics={metric: m[metric]}) for n, s, m in found)
        top = max(curve, key=lambda point: point.metrics[metric])
        if top.metrics[metric] > self._best:
            self._best, self._settings, self._iterations = top.metrics[metric], TRIALS[number], int(top.epoch)
            self.curve = curve
        return f"{metric} {top.metrics[metric]:.4f} after {top.epoch:g} iterations, {top.seconds:.1f} s"

    def final(self, seed: int) -> tuple[SeedResult, dict[str, torch.Tensor]]:
        """(fit of all of train with the best settings, its metrics per held-out case of this rank)."""
        cases: dict[str, torch.Tensor] = {}
        ((_, seconds, metrics),) = self._ranked(self.log, self._settings, self._iterations, 0, seed, cases)
        self._seeds.append(SeedResult(seed=seed, metrics=metrics, seconds={"train": seconds}))
        return self._seeds[-1], cases

    def result(self) -> MethodResult:
        """The row of the table; without figures if `implicit` is not installed."""
        if not self.available:
            return MethodResult(
                key=self.key,
                name=f"{self.name}: not installed",
                description=f"Not run: the library implicit is not installed ({INSTALL}).",
                seeds=(SeedResult(seed=self.config.seeds[0], metrics={}),),
            )
        words = ", ".join(f"{name.replace('_', ' ')} {value:g}" for name, value in self._settings.items())
        return MethodResult(
            key=self.key,
            name=self.name,
            description="Bayesian personalized ranking (Rendle et al. 2009) on all examples, by the library implicit. "
            f"Settings: {words}; {self._iterations} iterations.",
            seeds=tuple(self._seeds),
            rows=self.log.train.num_rows,
            table_bytes=4 * (self._dim + 1) * (self.log.num_users + self.log.num_items),
            curve=self.curve,
        )

    def _ranked(
        self,
        log: Log,
        settings: dict[str, float],
        iterations: int,
        every: int,
        seed: int,
        per_case: dict[str, torch.Tensor] | None = None,
    ) -> list[tuple[int, float, dict[str, float]]]:
        """(iterations, seconds, metrics) of each point. Rank 0 fits; all ranks evaluate. Collective.

        per_case: filled with the metrics of the last point, see `evaluate.ranking`.
        """
        path, config = self.folder / "bpr.npz", self.config
        with raise_on_all_ranks():
            if dist.get_rank() == 0:
                points = fit_bpr(log, settings, factors=self._dim, iterations=iterations, every=every, seed=seed)
                arrays: dict[str, np.ndarray] = {"at": np.array([(p.iterations, p.seconds) for p in points])}
                for number, point in enumerate(points):
                    arrays |= {f"users-{number}": point.users, f"items-{number}": point.items}
                np.savez(path, **arrays)  # type: ignore[arg-type]
        heldout, found = load_heldout(log, config.evaluation), []
        with np.load(path, allow_pickle=False) as saved:
            for number, (done, seconds) in enumerate(saved["at"]):
                users, items = (
                    vectors_from_factors(torch.from_numpy(saved[f"{side}-{number}"])) for side in ("users", "items")
                )
                metrics = rank_heldout(heldout, users, items, config.evaluation, torch.device("cpu"), per_case)
                found.append((int(done), float(seconds), metrics))
        dist.barrier()
        if dist.get_rank() == 0:
            path.unlink()
        return found
