"""The outcome of a training run: which network is published, and how it ranks the held-out rows."""

from __future__ import annotations

import logging
from typing import Any

from recpress.data.dataset.log import SIDES
from recpress.trainer.distributed.collectives import rank_and_world
from recpress.trainer.distributed.process_group import Ranks
from recpress.trainer.distributed.rank_errors import raise_on_all_ranks
from recpress.trainer.evaluate.heldout import FullHeldout, SampledHeldout
from recpress.trainer.evaluate.ranking import vectors_from_factors
from recpress.trainer.evaluate.stage import rank_heldout
from recpress.trainer.loop.config import FitResult
from recpress.trainer.model.two_tower import ShardedTwoTower
from recpress.trainer.train.choice import NOISE, Cases, Choice, paired_gain
from recpress.trainer.train.inputs import Inputs

logger = logging.getLogger(__name__)


def choose_published(choice: Choice | None, fitted: FitResult, *, warm_started: bool = False) -> dict[str, Any]:
    """The entries `best_epoch`, `fallback` and `validation` of the manifest; rank 0 logs them.

    `fallback`: the factorization's own ranking is published, because no epoch is better. A warm start makes a network
    before the first step, which may be better.
    """
    if choice is None or fitted.best is None:
        return {"best_epoch": None, "fallback": False, "validation": {}}
    best, metric, start = fitted.best, choice.metric, choice.start
    fallback = start is not None and best["step"] == 0 and not (warm_started and choice.accepts(best))
    last_best = max(fitted.evaluations[1:], key=lambda found: found[metric], default=None)
    published = start if fallback and start is not None else best
    validation = choice.describe() | {"published": published[metric], "network": last_best}
    if rank_and_world()[0] == 0:
        _log_choice(choice, best, last_best, fallback)
        if published[metric] <= choice.popularity[metric]:
            _warn_popularity(choice, published[metric])
    return {"best_epoch": int(best["epoch"]), "fallback": fallback, "validation": validation}


def _log_choice(choice: Choice, best: dict[str, float], network: dict[str, float] | None, fallback: bool) -> None:
    start = choice.start
    if start is None:
        return
    cases = f"on {choice.num_cases:,} validation rows"

    def against_start(found: dict[str, float]) -> str:
        names = [name for name in (choice.metric, choice.companion) if name in start]
        return ", ".join(f"{name} {found[name]:.4f} against {start[name]:.4f}" for name in names)

    if not fallback:
        epoch = int(best["epoch"])
        logger.info(f"the network improves on the factorization {cases}: {against_start(best)} (epoch {epoch})")
    elif network is None:
        logger.info("no network was trained: the factorization's ranking is kept")
    else:
        logger.info(
            f"the network did not improve on the factorization {cases} ({against_start(network)}): the "
            "factorization's ranking is kept"
        )


def _warn_popularity(choice: Choice, published: float) -> None:
    metric, popularity = choice.metric, choice.popularity[choice.metric]
    if choice.start is not None and choice.start[metric] <= popularity:
        cause = (
            "so do the factors: the log holds too little about tastes, or the settings of the factorization do not fit "
            "it (without --als options it chooses them)"
        )
    else:
        cause = (
            "the network learned too little or overfitted: give it --factors, more rows (--sample.rate 1) or more "
            "dropout"
        )
    logger.warning(
        f"the model ranks no better than popularity on {choice.num_cases:,} validation rows: {metric} {published:.4f} "
        f"against {popularity:.4f}; {cause}"
    )


def rank_test(
    inputs: Inputs, model: ShardedTwoTower, heldout: SampledHeldout | FullHeldout | None, ranks: Ranks
) -> tuple[dict[str, float], dict[str, float], Cases]:
    """Metrics of the held-out part: of the model, and of the factors' own ranking; those of the model for each case of
    this rank. {} if there are none. Collective.

    Warns if the model is worse than the factors by more than noise. Nothing was chosen on these rows.
    """
    if heldout is None:
        return {}, {}, {}
    evaluation, device = inputs.config.evaluation, ranks.device
    cases: Cases = {}
    metrics = rank_heldout(heldout, model.vectors("user"), model.vectors("item"), evaluation, device, cases)
    if inputs.factors is None:
        return metrics, {}, cases
    with raise_on_all_ranks():
        user, item = (vectors_from_factors(inputs.factors.table(side)) for side in SIDES)
    factor_cases: Cases = {}
    factorization = rank_heldout(heldout, user, item, evaluation, device, factor_cases)
    k = evaluation.k[0]
    for name in (f"NDCG@{k}", f"{'Recall' if isinstance(heldout, FullHeldout) else 'HR'}@{k}"):
        gain, error = paired_gain(cases[name], factor_cases[name])
        if gain < -NOISE * error and ranks.rank == 0:
            compressed = bool(inputs.maps) or inputs.config.model.tables.storage != "fp32"
            logger.warning(
                f"on the held-out part the model is below the full factors: {name} {metrics[name]:.4f} against "
                f"{factorization[name]:.4f}" + (" (its tables are compressed)" if compressed else "")
            )
    return metrics, factorization, cases
