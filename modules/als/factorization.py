"""Weighted least squares for implicit feedback, sharded over ranks (Hu, Koren, Volinsky 2008)."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from recpress.modules.als.auto import Fit, Sample, SettingsChoice, absolute, choose_settings, scales, until_converged
from recpress.modules.als.checks import separation
from recpress.modules.als.exchange import Exchange
from recpress.modules.als.factors import Factors, RowBlocks
from recpress.modules.als.half_sweep import HalfSweep, Limits, Solver, Workers
from recpress.modules.als.interactions import CSR, InteractionBuilder
from recpress.modules.als.solvers import solve_cg, solve_cholesky
from recpress.modules.config import ALSConfig, ALSParameters


@dataclass(frozen=True)
class SweepReport:
    """A finished sweep."""

    sweep: int
    """Its number, from 1."""
    sweeps: int
    """Number of all sweeps."""
    objective: float
    """Objective after the sweep."""
    seconds: float
    eta: float
    """Expected seconds for the remaining sweeps."""


class ALS:
    """Factorizes the interactions of all ranks. Each rank creates one, adds its part of the log, and calls `fit`.

    Users and items are sharded in contiguous blocks (`RowBlocks`). No rank holds the whole log. To solve users, a rank
    holds all item vectors if they take no more memory than its part of the log. Otherwise it fetches, for each chunk,
    the vectors that the chunk needs (`Limits.table`). Items likewise.

    Args:
        config: settings, or the absolute parameters of the objective.
        device: device of the vectors.
        process_group: None for the default group, or for one process if none is initialized.
        limits: bounds of the working memory; None for the defaults.

    Raises:
        ValueError: a parameter or a number of ids is out of range.

    Example:
        >>> als = ALS(ALSConfig(factors=8, auto=False), num_users=3, num_items=4)
        >>> als.add([0, 0, 1, 2], [0, 1, 1, 3])  # users and items, in any number of calls
        >>> factors = als.fit()
        >>> factors.users.shape, factors.items.shape
        (torch.Size([3, 8]), torch.Size([4, 8]))
    """

    def __init__(
        self,
        config: ALSConfig | ALSParameters,
        num_users: int,
        num_items: int,
        *,
        device: str | torch.device = "cpu",
        process_group: dist.ProcessGroup | None = None,
        limits: Limits | None = None,
    ) -> None:
        check(config)
        self.config, self.num_users, self.num_items = config, num_users, num_items
        self.exchange = Exchange(process_group, torch.device(device))
        self.limits = limits
        self.parameters: ALSParameters | None = config if isinstance(config, ALSParameters) else None
        """Parameters of the objective, after `fit`."""
        self.choice: SettingsChoice | None = None
        """How `fit` chose the settings that were not given, and how well the best ones rank held-out examples."""
        self.separation = math.nan
        """Share of interactions that score above a random pair of the same user, after `fit` (`checks.separation`)."""
        self.on_choice: Callable[[SettingsChoice], None] | None = None
        """Called with the choice before the sweeps."""
        self.builder = InteractionBuilder(num_users, num_items, self.exchange)

    def add(self, users: Any, items: Any, values: Any = None) -> None:
        """Add interactions of any users and items.

        Args:
            users, items: integer ids (n,), numpy or torch.
            values: (n,) >= 0; None for ones. The values of a repeated pair, on any ranks, are summed.

        Raises:
            ValueError: an id or a value is out of range. The error names the interaction.
        """
        self.builder.add(np.asarray(users), np.asarray(items), None if values is None else np.asarray(values))

    def fit(
        self,
        on_sweep: Callable[[SweepReport], bool | None] | None = None,
        start: Factors | None = None,
        interactions: tuple[CSR, CSR] | None = None,
    ) -> Factors:
        """Factorize the interactions that were added, and drop them. Collective.

        Args:
            on_sweep: called with the report of each sweep. True, on any rank, stops the sweeps.
            start: initial factors with this sharding, instead of random ones. They are not changed.
            interactions: by user and by item, instead of those that were added. They are not changed.

        Raises:
            ValueError: there are no interactions; the objective is not finite; a row's equations cannot be solved.
        """
        by_user, by_item = self.builder.build() if interactions is None else interactions
        rows = int(self.exchange.sum(torch.tensor(len(by_user.indices), device=self.exchange.device)))
        if rows == 0:
            raise ValueError("als: no interactions to fit, expected at least one that was added since the last fit")
        if by_user.values is not None:
            total = torch.tensor(by_user.values.sum(dtype=np.float64), device=self.exchange.device)
            if not self.exchange.sum(total) > 0:
                raise ValueError("als: all values (labels of interactions) are 0, expected a positive one")
        config = self.config
        if isinstance(config, ALSConfig):
            if start is not None:
                config = replace(config, factors=start.dim)
            if config.auto and start is None:
                config = self.choose(by_user)
            config = absolute(config, by_user, by_item, self.exchange)
            check(config)
        self.parameters = config
        return self._factorize(config, by_user, by_item, on_sweep, start)

    def choose(self, by_user: CSR) -> ALSConfig:
        """The settings that `fit` uses for this rank's users, all chosen. Collective."""
        assert isinstance(self.config, ALSConfig)
        if self.choice is None:
            config = until_converged(self.config)
            self.choice = choose_settings(
                config, by_user, self.num_users, self.num_items, self.exchange, self.prepare_sample
            )
            if self.on_choice is not None:
                self.on_choice(self.choice)
        return replace(until_converged(self.config), **self.choice.settings)

    def prepare_sample(self, sample: Sample) -> Fit:
        """A function that factorizes a sample over the ranks with other settings."""
        exchange = self.exchange
        builder = InteractionBuilder(sample.num_users, sample.num_items, exchange)
        part = slice(exchange.rank, None, exchange.world)
        builder.add(sample.users[part], sample.items[part], None if sample.values is None else sample.values[part])
        pair = builder.build()

        def fit(tried: ALSConfig) -> tuple[torch.Tensor, torch.Tensor]:
            als = ALS(
                absolute(tried, *pair, exchange), sample.num_users, sample.num_items,
                device=exchange.device, process_group=exchange.group, limits=self.limits,
            )  # fmt: skip
            factors = als._factorize(als.parameters, *pair, None, None, False)  # type: ignore[arg-type]
            return factors.users, exchange.gather(factors.items, RowBlocks(sample.num_items, exchange.world))

        return fit

    def _factorize(
        self,
        config: ALSParameters,
        by_user: CSR,
        by_item: CSR,
        on_sweep: Callable[[SweepReport], bool | None] | None,
        start: Factors | None,
        measure: bool = True,
    ) -> Factors:
        exchange = self.exchange
        self._check_start(start)
        factors = self._begin(config, start)  # after the peak of memory while building the CSRs
        user_scales, item_scales = None, None
        if config.item_exponent:
            user_scales, item_scales = scales(config, by_item, self.num_items, exchange)
        workers = Workers(exchange.device)
        try:
            common = (config, exchange, workers, self.limits)
            used = config.used_users, config.used_items
            users = HalfSweep("user", by_user, self.num_users, self.num_items, *common, user_scales, *used)
            items = HalfSweep("item", by_item, self.num_items, self.num_users, *common, item_scales, *used[::-1])
            # zero is the exact solution, and a random start would add to the other side's gramian
            factors.users[users.degree == 0] = 0
            factors.items[items.degree == 0] = 0
            self._sweeps(config, users, items, factors, on_sweep)
            self.separation = separation(by_user, factors, exchange) if measure else math.nan
        finally:
            workers.close()
        factors.user_counts, factors.item_counts = users.degree.cpu(), items.degree.cpu()
        return factors

    def _check_start(self, start: Factors | None) -> None:
        if start is None:
            return
        has = (start.num_users, start.num_items, start.dim, start.rank, start.world)
        assert self.parameters is not None
        want = (self.num_users, self.num_items, self.parameters.factors, self.exchange.rank, self.exchange.world)
        if has != want:
            raise ValueError(f"start factors: (users, items, dim, rank, world) is {has}, expected {want}")

    def _begin(self, config: ALSParameters, start: Factors | None) -> Factors:
        rank, world, device = self.exchange.rank, self.exchange.world, self.exchange.device
        if start is None:
            return initial_factors(config, self.num_users, self.num_items, rank, world, device)
        users, items = (x.to(device, torch.float32, copy=True) for x in (start.users, start.items))
        return Factors(users, items, self.num_users, self.num_items, rank, world)

    def _sweeps(
        self,
        config: ALSParameters,
        users: HalfSweep,
        items: HalfSweep,
        factors: Factors,
        on_sweep: Callable[[SweepReport], bool | None] | None,
    ) -> None:
        began, previous, last = time.perf_counter(), math.inf, False
        item_sums = items.summary(factors.items)
        for sweep in range(1, config.sweeps + 1):
            last |= sweep == config.sweeps
            at, solver = time.perf_counter(), _solver(config, sweep, last)
            users.solve(factors.users, factors.items, item_sums, solver)
            user_sums = users.summary(factors.users)
            local = items.solve(factors.items, factors.users, user_sums, solver)
            item_sums = items.summary(factors.items)
            # sum over all pairs of w_0 s^2 = w_0 trace(X'X Y'Y); the solver has returned the part of the interactions
            local += user_sums.penalty + item_sums.penalty
            total = torch.tensor(local, dtype=torch.float64, device=self.exchange.device)
            pairs = config.unobserved_weight * float((user_sums.gramian * item_sums.gramian).sum())
            objective = float(self.exchange.sum(total)) + pairs
            if not math.isfinite(objective):
                raise ValueError(
                    f"als: the objective is {objective} after sweep {sweep}, expected a finite number; raise "
                    "regularization (or mean_penalty), or lower confidence"
                )
            now = time.perf_counter()
            left = (now - began) / sweep * (config.sweeps - sweep)
            report = SweepReport(sweep, config.sweeps, objective, now - at, left)
            stop = on_sweep is not None and bool(on_sweep(report))
            if self.exchange.max(int(stop)) or last:
                break
            # one more sweep, since only the last takes steps of the best length
            last = config.tolerance > 0 and previous - objective < config.tolerance * abs(previous)
            previous = objective


def _solver(config: ALSParameters, sweep: int, last: bool) -> Solver:
    """The solver of a sweep, counted from 1.

    `auto` was measured on MovieLens-1M and Gowalla at several settings. After two sweeps, vectors move so little that
    a second step costs more than it gains, while steps that are 1.4 times as long usually give a lower objective after
    15 sweeps than the exact solver. The last sweep has steps of the best length.
    """
    if config.solver == "cholesky":
        return solve_cholesky
    if config.solver == "cg":
        return partial(solve_cg, steps=3)
    if sweep <= 2:
        return partial(solve_cg, steps=2)
    return partial(solve_cg, steps=1, relaxation=1.0 if last else 1.4)


MOST_FACTORS = 1 << 14
"""The equations of one row then take 1 GiB."""


def check(config: ALSConfig | ALSParameters) -> None:
    """Raise ValueError that names the first field that is out of range."""
    values = {name: value for name, value in asdict(config).items() if value is not None}
    if config.solver not in ("auto", "cg", "cholesky"):
        raise ValueError(f"als: solver is {config.solver!r}, expected auto, cg or cholesky")
    for name, least in (("factors", 1), ("max_factors", 1), ("sweeps", 0), ("auto_trials", 1)):
        if values.get(name, least) < least:
            raise ValueError(f"als: {name} is {values[name]}, expected at least {least}")
    for name in ("factors", "max_factors"):
        if values.get(name, 0) > MOST_FACTORS:
            raise ValueError(f"als: {name} is {values[name]}, expected at most {MOST_FACTORS}")
    for name in (
        "confidence", "unobserved_ratio", "mean_penalty", "item_exponent", "unobserved_weight", "regularization",
        "frequency_exponent", "tolerance", "auto_cost",
    ):  # fmt: skip
        value = values.get(name, 0.0)
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"als: {name} is {value}, expected a finite number >= 0")


def initial_rows(seed: int, side: int, first: int, last: int, dim: int) -> np.ndarray:
    """Rows first..last-1 of the initial vectors of users (side 0) or items (1).

    float32 (rows, dim), uniform with standard deviation 0.1 / sqrt(dim). A pure function of (seed, side, row), the same
    at every world size: a Philox step gives 8 float32.
    """
    width = -(-dim // 8) * 8
    bits = np.random.Philox(key=[seed % 2**64, side]).advance(first * width // 8)
    rows = np.random.Generator(bits).random((last - first, width), dtype=np.float32)[:, :dim]
    return (rows - np.float32(0.5)) * np.float32(0.1 * (12 / dim) ** 0.5)


def initial_factors(
    config: ALSParameters, num_users: int, num_items: int, rank: int, world: int, device: torch.device
) -> Factors:
    """The random initial factors."""
    shards = []
    for side, count in enumerate((num_users, num_items)):
        blocks = RowBlocks(count, world)
        begin, end = blocks.start(rank), blocks.stop(rank)
        shard = torch.empty(end - begin, config.factors, device=device)
        for first in range(begin, end, 512):
            last = min(first + 512, end)
            rows = initial_rows(config.seed, side, first, last, config.factors)
            shard[first - begin : last - begin] = torch.from_numpy(rows).to(device)
        shards.append(shard)
    return Factors(shards[0], shards[1], num_users, num_items, rank, world)
