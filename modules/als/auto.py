"""Settings of a factorization that do not depend on the size of the log, and their choice on held-out examples.

`ALSConfig` states relative settings: the total weight of the unobserved pairs against that of the interactions, and
the mean penalty of a user's vector. `absolute` turns them into `ALSParameters`, the parameters of the objective:

    unobserved_weight = ratio * W / (U * I)
    regularization    = penalty * (W / n) / mean_u (n_u + unobserved_weight * I) ** frequency_exponent

with n interactions of total weight W, between U users and I items that have any. `choose_settings` chooses what the
caller does not give: it hides one item of some users, factorizes the rest with each candidate, and ranks the hidden
items.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch

from recpress.modules.als.exchange import Exchange
from recpress.modules.als.factors import RowBlocks
from recpress.modules.als.half_sweep import Scales
from recpress.modules.als.interactions import CSR
from recpress.modules.config import ALSConfig, ALSParameters

DEFAULTS: dict[str, Any] = {
    "factors": 64,
    "sweeps": 10,
    "unobserved_ratio": 4.0,
    "mean_penalty": 3.0,
    "item_exponent": 0.25,
}
"""Settings without a choice: within a few percent of the best on six logs (benchmarks/README.md)."""
CANDIDATES = (
    (4.0, 3.0, 0.25), (4.0, 5.0, 0.25), (12.0, 3.0, 0.25), (12.0, 5.0, 0.25), (12.0, 3.0, 0.5), (4.0, 5.0, 0.0),
    (4.0, 8.0, 0.0), (4.0, 2.0, 0.25),
)  # fmt: skip
"""(unobserved_ratio, mean_penalty, item_exponent) of the first round."""
_NAMES = ("unobserved_ratio", "mean_penalty", "item_exponent")
_ROUNDS = ((32, 3), (64, 5))
"""Largest dimension and sweeps of the rounds. A last round compares dimensions."""
SAMPLE = 4_000_000
"""Most interactions of the subsample. Each rank holds all of it, in several int64 arrays while it is built."""
USERS = 3000
"""Most users with a hidden item."""
NEGATIVES = 99
TOP = 10
MOST_SWEEPS = 15
TOLERANCE = 2e-3
"""A fit ends one sweep after the objective fell by less than this share: after 9 to 12 sweeps on seven logs, whose
NDCG@10 differs by less than 1 % from that after 10."""
_ITEMS = 2048  # sampled items for the `full` metric
_EFFICIENCY = 0.5  # `_cost` does not count ranking and building the sample
_LEAST_INTERACTIONS = 35_000
LEAST_USERS = 50
"""With fewer hidden items, differences are noise."""

Fit = Callable[[ALSConfig], tuple[torch.Tensor, torch.Tensor]]
"""Factorizes a sample: vectors of this rank's users, (rows, d), and of all items, (num_items, d)."""


@dataclass
class Trial:
    """The result of one candidate on the hidden items."""

    settings: dict[str, Any]
    ndcg: float
    """NDCG@10, mean over the hidden items."""
    gain: np.ndarray = field(repr=False)
    """NDCG@10 of each hidden item, (n,)."""


@dataclass
class SettingsChoice:
    """What `choose_settings` compared and found."""

    settings: dict[str, Any]
    """The best candidate."""
    metric: str = "sampled"
    rows: int = 0
    """Number of ranked hidden items. 0: there were too few to choose, so the defaults apply."""
    interactions: int = 0
    """Interactions of the subsample."""
    ndcg: float = math.nan
    """NDCG@10 of the best candidate on the hidden items."""
    popularity: float = math.nan
    """NDCG@10 of the ranking by item counts."""
    above_popularity: bool = True
    """Whether the best candidate beats popularity by more than the noise."""
    trials: list[dict[str, Any]] = field(default_factory=list)
    """Candidates by round, best first: settings with factors, sweeps, ndcg."""
    runner_up: dict[str, Any] | None = None

    def describe(self) -> dict[str, Any]:
        """As JSON values. What was not measured is None, because JSON has no NaN."""
        return {
            name: None if isinstance(value, float) and math.isnan(value) else value
            for name, value in asdict(self).items()
        }

    def line(self) -> str:
        """One line for the terminal."""
        shown = ", ".join(f"{name} {value:g}" for name, value in self.settings.items() if name != "sweeps")
        if not self.rows:
            return (
                f"auto: too few users to compare settings: fewer than {LEAST_USERS} have an item to hide (of two or "
                f"more, and not theirs alone); using the defaults ({shown})"
            )
        text = f"auto: {shown}: NDCG@{TOP} {self.ndcg:.4f} on {self.rows:,} held-out examples"
        if self.runner_up is not None:
            other = {k: v for k, v in self.runner_up["settings"].items() if self.settings.get(k) != v}
            text += f"; runner-up {', '.join(f'{k} {v:g}' for k, v in other.items())}: {self.runner_up['ndcg']:.4f}"
        return f"{text}; popularity {self.popularity:.4f}"


@dataclass(frozen=True)
class Sample:
    """Interactions of some users, renumbered from 0, and their hidden items. The same on every rank."""

    users: np.ndarray
    items: np.ndarray
    values: np.ndarray | None
    num_users: int
    num_items: int
    hidden_users: np.ndarray
    """Ascending and distinct."""
    hidden_items: np.ndarray

    @property
    def counts(self) -> np.ndarray:
        """Interactions of each item, (num_items,)."""
        return np.bincount(self.items, minlength=self.num_items)


def absolute(config: ALSConfig, by_user: CSR, by_item: CSR, exchange: Exchange) -> ALSParameters:
    """The parameters of the objective for the interactions of all ranks. `DEFAULTS` fills in what is not given."""
    given = settings_of(config)
    exponent = given["item_exponent"]
    degrees = np.diff(by_item.indptr)
    sums = degrees.astype(np.float64) if by_item.values is None else _sums(by_item)
    active = degrees > 0
    scaled = float((sums[active] * degrees[active].astype(np.float64) ** -exponent).sum())
    users = np.diff(by_user.indptr)
    totals = torch.tensor(
        [float(len(by_item.indices)), float(sums.sum()), scaled, float((users > 0).sum()), float(active.sum())],
        dtype=torch.float64,
        device=exchange.device,
    )
    rows, weight, scaled, num_users, num_items = exchange.sum(totals).tolist()
    scale = weight / scaled if exponent and scaled > 0 else 1.0
    unobserved = config.unobserved_weight
    if unobserved is None:
        unobserved = given["unobserved_ratio"] * config.confidence * weight / max(num_users * num_items, 1.0)
    regularization = config.regularization
    if regularization is None:
        with np.errstate(over="ignore"):
            powers = (users[users > 0] + unobserved * num_items) ** config.frequency_exponent
        mean = float(exchange.sum(torch.tensor(float(powers.sum()), dtype=torch.float64, device=exchange.device)))
        mean /= max(num_users, 1.0)
        unit = config.confidence * weight / max(rows, 1.0)
        regularization = given["mean_penalty"] * unit / mean if mean > 0 and math.isfinite(mean) else 0.0
    return ALSParameters(
        factors=int(given["factors"]),
        sweeps=int(given["sweeps"]),
        confidence=config.confidence,
        unobserved_weight=unobserved,
        regularization=regularization,
        frequency_exponent=config.frequency_exponent,
        item_exponent=exponent,
        item_scale=scale,
        used_users=int(num_users),
        used_items=int(num_items),
        solver=config.solver,
        tolerance=config.tolerance,
        seed=config.seed,
    )


def until_converged(config: ALSConfig) -> ALSConfig:
    """`config` with as many sweeps as the log needs, unless it sets the number of sweeps."""
    if config.sweeps is not None:
        return config
    return replace(config, sweeps=MOST_SWEEPS, tolerance=config.tolerance or TOLERANCE)


def settings_of(config: ALSConfig) -> dict[str, Any]:
    """The settings that can be chosen, by name. `DEFAULTS` fills in what is not given."""
    defaults = DEFAULTS | {"factors": min(DEFAULTS["factors"], config.max_factors)}
    return {name: default if (got := getattr(config, name)) is None else got for name, default in defaults.items()}


def item_weights(parameters: ALSParameters, counts: np.ndarray) -> np.ndarray:
    """g of `ALSParameters` for items with these counts, float32."""
    return (parameters.item_scale * np.maximum(counts, 1.0) ** -parameters.item_exponent).astype(np.float32)


def scales(parameters: ALSParameters, by_item: CSR, num_items: int, exchange: Exchange) -> tuple[Scales, Scales]:
    """Weights of interactions by item, for solving users and for solving items. Collective."""
    own = item_weights(parameters, np.diff(by_item.indptr))
    every = torch.zeros(num_items, device=exchange.device)
    every[by_item.start : by_item.start + len(own)] = torch.from_numpy(own).to(exchange.device)
    return Scales(others=exchange.sum(every).cpu().numpy()), Scales(rows=own)


def choose_settings(
    config: ALSConfig,
    by_user: CSR,
    num_users: int,
    num_items: int,
    exchange: Exchange,
    prepare: Callable[[Sample], Fit],
) -> SettingsChoice:
    """Choose the settings that `config` does not give, by NDCG@10 of hidden items. Collective.

    Successive halving: all candidates in few dimensions, the best of them in more, then the winner in the largest
    allowed dimension. The subsample of users is small enough that all of this costs about one factorization; it has at
    most `SAMPLE` interactions, and each rank holds all of it. The choice depends on the interactions and the seed, not
    on the world size, except for candidates that differ by less than rounding.

    Args:
        by_user: this rank's users with all their interactions.
        prepare: returns a function that factorizes a sample over the ranks.
    """
    given = settings_of(config)
    most = config.factors or config.max_factors
    rounds = [(min(dim, most), sweeps) for dim, sweeps in _ROUNDS]
    open_names = [name for name in _open(config) if name in _NAMES]
    candidates = _candidates(config, open_names)
    rows = int(exchange.sum(torch.tensor(len(by_user.indices), device=exchange.device)))
    metric = "full" if config.auto_metric == "full" else "sampled"
    finalists = max(2, len(candidates) // 4)
    runs = [(len(candidates), *rounds[0]), (min(len(candidates), finalists), *rounds[1])]
    runs = runs if len(candidates) > 1 else runs[1:]
    if config.factors is None and most > rounds[-1][0]:
        runs.append((1, most, rounds[-1][1]))
    share = _share(config, rows, num_users, num_items, most, runs)
    sample = take_sample(by_user, share, config.seed, exchange)
    settings = given | ({} if config.factors or not config.auto else {"factors": min(most, 64)})
    choice = SettingsChoice(_used(config, settings), metric)
    if sample is None or len(sample.hidden_users) < LEAST_USERS:
        return choice
    fit = prepare(sample)
    rank_hidden = hidden_ranker(sample, metric, config.seed, exchange)
    popular = torch.from_numpy(sample.counts.astype(np.float32))[:, None]
    baseline = rank_hidden(
        torch.ones(_own(sample, exchange)[1], 1, device=exchange.device), popular.to(exchange.device)
    )

    def run(settings: dict[str, Any], dim: int, sweeps: int) -> Trial:
        gain = rank_hidden(
            *fit(replace(config, auto=False, tolerance=0.0, **(settings | {"factors": dim, "sweeps": sweeps})))
        )
        trial = Trial(settings, float(gain.mean()), gain)
        listed = {"settings": settings | {"factors": dim}, "sweeps": sweeps, "ndcg": round(trial.ndcg, 6)}
        choice.trials.append(listed)
        return trial

    if len(candidates) == 1:  # compare only dimensions and popularity
        dim = most if config.factors is not None else rounds[-1][0]
        found = [run(candidates[0], dim, rounds[-1][1])]
    else:
        for dim, sweeps in rounds:
            found = [run(settings, dim, sweeps) for settings in candidates]
            found.sort(key=lambda trial: -trial.ndcg)  # stable, so that ties have a fixed order
            candidates = [trial.settings for trial in found[:finalists]]
    best, runner, narrow_dim = found[0], found[1] if len(found) > 1 else None, rounds[-1][0]
    dim = runner_dim = config.factors or narrow_dim
    if config.factors is None and most > narrow_dim:
        wide = run(best.settings, most, rounds[-1][1])
        lost = best.gain - wide.gain
        # a sample supports fewer dimensions than the log, so choose fewer only if they are clearly better
        if lost.mean() > 2 * lost.std() / math.sqrt(len(lost)):
            runner, runner_dim = wide, most
        else:
            best, runner, dim = wide, best, most
    choice.settings = _used(config, given | best.settings | {"factors": dim})
    choice.rows, choice.interactions = len(best.gain), len(sample.users)
    choice.ndcg, choice.popularity = best.ndcg, float(baseline.mean())
    if runner is not None:
        settings = choice.settings | runner.settings | {"factors": runner_dim}
        choice.runner_up = {"settings": _used(config, settings), "ndcg": round(runner.ndcg, 6)}
    margin = best.gain - baseline
    noise = float(margin.std()) / math.sqrt(len(margin))
    choice.above_popularity = bool(margin.mean() > 2 * noise)
    choice.trials.sort(key=lambda trial: (-trial["settings"]["factors"], -trial["ndcg"]))
    return choice


def _used(config: ALSConfig, settings: dict[str, Any]) -> dict[str, Any]:
    """`settings`, in which absolute settings of `config` replace the relative ones."""
    absolute = {"unobserved_ratio": "unobserved_weight", "mean_penalty": "regularization"}
    absolute = {name: other for name, other in absolute.items() if getattr(config, other) is not None}
    kept = {name: value for name, value in settings.items() if name not in absolute}
    return kept | {other: getattr(config, other) for other in absolute.values()}


def _open(config: ALSConfig) -> list[str]:
    """Names of the settings that the caller does not give."""
    if not config.auto:
        return []
    names = [name for name in DEFAULTS if getattr(config, name) is None]
    fixed = {"unobserved_ratio": config.unobserved_weight, "mean_penalty": config.regularization}
    return [name for name in names if fixed.get(name) is None]


def _candidates(config: ALSConfig, names: list[str]) -> list[dict[str, Any]]:
    """At most `auto_trials` distinct settings of `names`: `CANDIDATES`, then random ones from wider ranges."""
    given = {name: value for name, value in settings_of(config).items() if name in _NAMES}
    rng = np.random.default_rng([config.seed % 2**32, 7])
    found: list[dict[str, Any]] = []
    for number in range(4 * max(config.auto_trials, len(CANDIDATES))):
        drawn = float(np.exp(rng.uniform(0, 4))), float(np.exp(rng.uniform(0, 2.5))), rng.integers(0, 5) / 8
        values = CANDIDATES[number] if number < len(CANDIDATES) else (round(drawn[0], 2), round(drawn[1], 2), drawn[2])
        settings = given | {name: value for name, value in zip(_NAMES, values, strict=True) if name in names}
        if settings not in found and len(found) < config.auto_trials:
            found.append(settings)
    return found


def _share(
    config: ALSConfig, rows: int, num_users: int, num_items: int, dim: int, runs: list[tuple[int, int, int]]
) -> float:
    """The share of users for which `runs` (times, dimension, sweeps) cost `auto_cost` factorizations of `dim`.

    A sample of users has fewer interactions, but nearly all items.
    """
    budget = _cost(rows, num_users + num_items, dim, DEFAULTS["sweeps"]) * config.auto_cost * _EFFICIENCY
    of_items = sum(times * _cost(0, num_items, *run) for times, *run in runs)
    of_users = sum(times * _cost(rows, num_users, *run) for times, *run in runs)
    allowed = (budget - of_items) / max(of_users, 1.0)
    least = max(_LEAST_INTERACTIONS, min(2 * _LEAST_INTERACTIONS, USERS * rows / max(num_users, 1)))
    return min(1.0, max(allowed, least / max(rows, 1)), SAMPLE / max(rows, 1))


def _cost(rows: int, ids: int, dim: int, sweeps: int) -> float:
    """Multiplications of sweeps, up to a constant: two passes over the interactions, one solve per vector."""
    return float(sweeps) * (2.0 * rows * (dim + 64) + float(ids) * dim * dim)


def take_sample(by_user: CSR, share: float, seed: int, exchange: Exchange, most_users: int = USERS) -> Sample | None:
    """A share of the users with all their interactions, with one hidden item for at most `most_users` of them.

    Which users are sampled, and which items are hidden, depends on the seed and the user only. None if it is empty.
    """
    degrees = np.diff(by_user.indptr)
    drawn = _uniform(seed, by_user.start, len(degrees), 0) < share
    picked = np.flatnonzero(drawn & (degrees > 0))
    lengths = degrees[picked]
    at = (
        np.repeat(by_user.indptr[picked] - np.concatenate(([0], np.cumsum(lengths)[:-1])), lengths)
        if len(picked)
        else 0
    )
    places = np.arange(int(lengths.sum())) + at
    users = np.repeat(picked + by_user.start, lengths)
    items = by_user.indices[places] if len(picked) else by_user.indices[:0]
    columns = [users.astype(np.int64), items.astype(np.int64)]
    if by_user.values is not None:
        columns.append(by_user.values[places] if len(picked) else by_user.values[:0])
    columns = [_gather(column, exchange) for column in columns]
    users, items = columns[:2]
    if not len(users):
        return None
    own_ids, dense_users, counts = np.unique(users, return_inverse=True, return_counts=True)
    # hide, for users with at least two items, a random item that another user has, too
    first = np.concatenate(([0], np.cumsum(counts)[:-1]))
    _, dense_items, item_counts = np.unique(items, return_inverse=True, return_counts=True)
    place = first + (_uniform_of(seed, own_ids, 1) * counts).astype(np.int64)
    able = np.flatnonzero((counts >= 2) & (item_counts[dense_items[place]] >= 2))
    if len(able) > most_users:
        able = np.sort(able[np.argsort(_uniform_of(seed, own_ids[able], 2), kind="stable")[:most_users]])
    kept = np.ones(len(users), bool)
    kept[place[able]] = False
    # if all interactions of an item are hidden, it has a zero vector, as an unseen item would
    return Sample(
        users=dense_users[kept],
        items=dense_items[kept],
        values=columns[2][kept] if len(columns) > 2 else None,
        num_users=len(own_ids),
        num_items=len(item_counts),
        hidden_users=able,
        hidden_items=dense_items[place[able]],
    )


def hidden_ranker(
    sample: Sample, metric: str, seed: int, exchange: Exchange
) -> Callable[[torch.Tensor, torch.Tensor], np.ndarray]:
    """(this rank's users (rows, d), all items (num_items, d)) -> NDCG@10 of every hidden item. Collective."""
    start, size = _own(sample, exchange)
    mine = (sample.hidden_users >= start) & (sample.hidden_users < start + size)
    users, items = sample.hidden_users[mine] - start, sample.hidden_items[mine]
    device = exchange.device
    if metric == "sampled":
        rng_rows = _uniform_table(seed, sample.hidden_users[mine], NEGATIVES * 2)
        drawn = (rng_rows * sample.num_items).astype(np.int64)
        keys = np.sort(sample.users * np.int64(sample.num_items) + sample.items)
        wanted = sample.hidden_users[mine][:, None] * np.int64(sample.num_items) + drawn
        at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
        met = (keys[at] == wanted) | (drawn == items[:, None])
        # take the first draws that the user has not interacted with; some users have fewer than NEGATIVES
        met |= np.cumsum(~met, axis=1) > NEGATIVES
        competitors, counted = torch.from_numpy(drawn).to(device), torch.from_numpy(~met).to(device)
    else:
        pool = np.arange(sample.num_items)
        if len(pool) > _ITEMS:  # estimate the rank among all items from a sample
            pool = np.sort(np.argsort(_uniform_of(seed, pool, 3), kind="stable")[:_ITEMS])
        times = sample.num_items / len(pool)
        column = np.full(sample.num_items, -1)
        column[pool] = np.arange(len(pool))
        place = np.full(sample.num_users, -1)
        place[sample.hidden_users[mine]] = np.arange(len(users))
        # mask the items of the user, and the target
        met_row = np.concatenate([place[sample.users], np.arange(len(users))])
        met_column = column[np.concatenate([sample.items, items])]
        counts = (met_row >= 0) & (met_column >= 0)
        order = np.argsort(met_row[counts], kind="stable")
        met_row, met_column = met_row[counts][order], met_column[counts][order]
    rows, targets = torch.from_numpy(users).to(device), torch.from_numpy(items).to(device)

    def gains(user_vectors: torch.Tensor, item_vectors: torch.Tensor) -> np.ndarray:
        found = np.zeros(len(sample.hidden_users))
        own = []
        pooled = item_vectors[torch.from_numpy(pool).to(device)] if metric == "full" else None
        for begin in range(0, len(rows), 256):
            part = slice(begin, begin + 256)
            vectors = user_vectors[rows[part]]
            score = (vectors * item_vectors[targets[part]]).sum(1)
            if metric == "sampled":
                others = torch.einsum("bd,bnd->bn", vectors, item_vectors[competitors[part]])
                ahead = ((others >= score[:, None]) & counted[part]).sum(1)
            else:
                scores = vectors @ pooled.T  # type: ignore[union-attr]
                cut = slice(*np.searchsorted(met_row, (begin, begin + len(vectors))))
                scores[torch.from_numpy(met_row[cut] - begin), torch.from_numpy(met_column[cut])] = -torch.inf
                ahead = (scores >= score[:, None]).sum(1) * times
            own.append(torch.where(ahead < TOP, 1.0 / torch.log2(ahead.double() + 2.0), 0.0))
        if own:
            found[mine] = torch.cat(own).cpu().numpy()
        return exchange.sum(torch.from_numpy(found).to(device)).cpu().numpy()

    return gains


def _own(sample: Sample, exchange: Exchange) -> tuple[int, int]:
    """First user and number of users of this rank's block."""
    blocks = RowBlocks(sample.num_users, exchange.world)
    return blocks.start(exchange.rank), blocks.size(exchange.rank)


def _gather(column: np.ndarray, exchange: Exchange) -> np.ndarray:
    """The columns of all ranks, in rank order."""
    return column if exchange.world == 1 else exchange.all_to_all([column] * exchange.world)


def _sums(csr: CSR) -> np.ndarray:
    """Sum of each row's values, (rows,) float64."""
    assert csr.values is not None
    ends = np.concatenate(([0.0], np.cumsum(csr.values, dtype=np.float64)))
    return ends[csr.indptr[1:]] - ends[csr.indptr[:-1]]


def _uniform(seed: int, start: int, count: int, stream: int) -> np.ndarray:
    return _uniform_of(seed, np.arange(start, start + count), stream)


def _uniform_of(seed: int, ids: np.ndarray, stream: int) -> np.ndarray:
    """A number in [0, 1) for each id, a pure function of (seed, id, stream): splitmix64."""
    with np.errstate(over="ignore"):
        z = np.asarray(ids).astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        z += np.uint64((seed * 0xD1B54A32D192ED03 + stream * 0x8CB92BA72F3D8DD7) % 2**64)
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (30, 0xBF58476D1CE4E5B9)):
            z = (z ^ (z >> np.uint64(shift))) * np.uint64(factor)
        z ^= z >> np.uint64(31)
    return (z >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _uniform_table(seed: int, ids: np.ndarray, columns: int) -> np.ndarray:
    """As `_uniform_of`, (len(ids), columns)."""
    return np.stack([_uniform_of(seed, ids, 3 + column) for column in range(columns)], axis=1)
