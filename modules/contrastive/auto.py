"""Choice of settings of a contrastive factorization, and between it and least squares.

As in `als.auto`, one item of some users is hidden, each candidate factorizes the rest, and the hidden items are ranked.
Successive halving: all temperatures for few epochs, the best two for more, the best one for many. Each run lowers its
learning rate to the end, so that short runs compare. The vectors of the best run choose the popularity exponent. The
subsample has at most `INTERACTIONS` interactions, so all of this costs at most that of `EPOCHS` epochs over them,
whatever the size of the log.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F

from recpress.modules.als.auto import LEAST_USERS, Sample, hidden_ranker, take_sample
from recpress.modules.als.exchange import Exchange
from recpress.modules.als.factors import RowBlocks
from recpress.modules.als.interactions import CSR, InteractionBuilder
from recpress.modules.config import ContrastiveConfig
from recpress.modules.contrastive.factorization import DEFAULTS, Run, item_lengths, with_defaults

TEMPERATURES = (0.1, 0.15, 0.2, 0.3)
ROUNDS = ((16, 4), (40, 2), (120, 1))
"""Epochs and candidates of the rounds."""
POPULARITY_EXPONENTS = (0.0, 0.025, 0.05, 0.1, 0.15)
"""Of a length that is a power of the count, so they hold for counts of any size."""
MORE = 1.25
"""Epochs of the factorization, in units of those of the best run: 20, 50 or 150."""
EPOCHS = sum(epochs * candidates for epochs, candidates in ROUNDS)
INTERACTIONS = 1_000_000
"""Most interactions of the subsample. In a smaller one, items have fewer interactions, and higher temperatures win:
with 250,000 of Gowalla's 820,000, 0.15 instead of 0.1, which costs 7 % of NDCG@10."""
USERS = 20_000
"""Most users with a hidden item: of 3,000, the methods' difference on Beauty (7 %) was within two standard errors."""

Fit = Callable[[Sample], tuple[torch.Tensor, torch.Tensor]]
"""Factorizes a sample: vectors of this rank's users, (rows, d), and of all items, (num_items, d)."""


@dataclass
class MethodChoice:
    """What `choose` compared and found."""

    method: Literal["softmax", "als"]
    settings: dict[str, Any]
    """Temperature, epochs and popularity exponent of `softmax`."""
    metric: str
    rows: int = 0
    """Number of ranked hidden items. 0: there were too few to choose."""
    interactions: int = 0
    """Interactions of the subsample."""
    ndcg: dict[str, float] = field(default_factory=dict)
    """NDCG@10 of the best candidate of each method."""
    noise: float = math.nan
    """Standard error of the difference between the methods."""
    trials: list[dict[str, Any]] = field(default_factory=list)
    """Candidates of `softmax`, in the order of the rounds, then popularity exponents of the best one."""
    runner_up: dict[str, Any] | None = None
    """The method or, if only one was compared, the temperature that is second."""

    def describe(self) -> dict[str, Any]:
        """As JSON values."""
        found = asdict(self)
        return found | {"noise": None if math.isnan(self.noise) else self.noise}

    def line(self) -> str:
        """One line for the terminal."""
        shown = ", ".join(f"{name} {value:g}" for name, value in self.settings.items())
        chosen = f"softmax ({shown})" if self.method == "softmax" else "als"
        if not self.rows:
            return (
                f"auto: too few users to compare: fewer than {LEAST_USERS} have an item to hide (of two or more, "
                f"and not theirs alone); using {chosen}"
            )
        text = f"auto: {chosen}: NDCG@10 {self.ndcg[self.method]:.4f} on {self.rows:,} held-out examples"
        if self.runner_up is not None:
            other = self.runner_up.get("method") or f"temperature {self.runner_up['temperature']:g}"
            text += f"; runner-up {other}: {self.runner_up['ndcg']:.4f}"
        return text


def choose(
    config: ContrastiveConfig, by_user: CSR, exchange: Exchange, metric: str, als: Fit | None = None
) -> MethodChoice:
    """Choose what `config` does not give, and the method if `als` is given, by NDCG@10 of hidden items. Collective.

    `softmax` must be better than `als` by more than two standard errors, because it takes longer. The choice depends on
    the interactions and the seed; on the world size only through the order of negatives.

    Args:
        by_user: this rank's users with all their interactions.
        metric: `sampled` or `full`, as in `ALSConfig.auto_metric`.
        als: factorizes a sample by least squares.
    """
    settings = {name: getattr(with_defaults(config), name) for name in DEFAULTS}
    choice = MethodChoice("softmax" if als is None else "als", settings, metric)
    rows = int(exchange.sum(torch.tensor(len(by_user.indices), device=exchange.device)))
    if als is None and (not config.auto or None not in (config.temperature, config.epochs)):
        return choice
    sample = take_sample(by_user, min(1.0, INTERACTIONS / max(rows, 1)), config.seed, exchange, USERS)
    if sample is None or len(sample.hidden_users) < LEAST_USERS:
        return choice
    rank_hidden = hidden_ranker(sample, metric, config.seed, exchange)
    pair = _interactions(sample, exchange)
    counts = np.bincount(sample.items, minlength=sample.num_items)
    choice.rows, choice.interactions = len(sample.hidden_users), len(sample.users)
    gains: dict[tuple[float, int], np.ndarray] = {}
    top = -1.0
    vectors: tuple[torch.Tensor, torch.Tensor]  # of the best run

    def run(temperature: float, epochs: int) -> float:
        nonlocal top, vectors
        tried = replace(config, temperature=temperature, epochs=epochs, patience=0)
        trained = Run(tried, *pair, sample.num_users, sample.num_items, exchange)
        trained.train()
        made = trained.factors()
        items = exchange.gather(made.items, RowBlocks(sample.num_items, exchange.world))
        gains[temperature, epochs] = gain = rank_hidden(made.users, items)
        if gain.mean() > top:
            top, vectors = float(gain.mean()), (made.users, items)
        choice.trials.append({"temperature": temperature, "epochs": epochs, "ndcg": round(float(gain.mean()), 6)})
        return float(gain.mean())

    candidates = list(TEMPERATURES)
    if config.temperature is not None or not config.auto:
        candidates = [settings["temperature"]]
    rounds = [(min(epochs, config.epochs or epochs), count) for epochs, count in ROUNDS]
    if config.epochs is not None:  # shorter runs would only choose the temperature
        rounds = rounds[-1:] if len(candidates) == 1 else rounds
    for epochs, count in rounds:
        found = [(run(t, epochs), t) for t in candidates[:count] if (t, epochs) not in gains]
        candidates = [t for _, t in sorted(found, reverse=True)] or candidates
        if found and max(found)[0] < top:  # a shorter run was better
            break
    # the last run of each temperature
    last = {t: gain for (t, _), gain in gains.items()}
    best = max(gains, key=lambda key: float(gains[key].mean()))
    settings["temperature"] = best[0]
    if config.epochs is None:
        settings["epochs"] = round(MORE * best[1])
    ours = gains[best]
    if config.popularity_exponent is None and config.auto:
        users, items = vectors
        units = F.normalize(items)
        for exponent in POPULARITY_EXPONENTS:
            if exponent == DEFAULTS["popularity_exponent"]:
                gain = gains[best]
            else:
                lengths = item_lengths(replace(config, popularity_exponent=exponent), counts, exchange.device)
                gain = rank_hidden(users, units * lengths)
            choice.trials.append({"popularity_exponent": exponent, "ndcg": round(float(gain.mean()), 6)})
            if gain.mean() > ours.mean():
                ours, settings["popularity_exponent"] = gain, exponent
    choice.ndcg["softmax"] = float(ours.mean())
    others = sorted(((float(gain.mean()), t) for t, gain in last.items() if t != best[0]), reverse=True)
    if others:
        choice.runner_up = {"temperature": others[0][1], "ndcg": round(others[0][0], 6)}
    if als is not None:
        theirs = rank_hidden(*als(sample))
        choice.ndcg["als"] = float(theirs.mean())
        gap = ours - theirs
        choice.noise = float(gap.std()) / math.sqrt(len(gap))
        choice.method = "softmax" if gap.mean() > 2 * choice.noise else "als"
        second = "als" if choice.method == "softmax" else "softmax"
        choice.runner_up = {"method": second, "ndcg": round(choice.ndcg[second], 6)}
    return choice


def _interactions(sample: Sample, exchange: Exchange) -> tuple[CSR, CSR]:
    """The interactions of a sample, by user and by item."""
    builder = InteractionBuilder(sample.num_users, sample.num_items, exchange)
    part = slice(exchange.rank, None, exchange.world)
    builder.add(sample.users[part], sample.items[part], None if sample.values is None else sample.values[part])
    return builder.build()
