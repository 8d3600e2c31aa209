"""The best evaluation, and patience."""

import math

from recpress.trainer.loop.best import BestModel
from recpress.trainer.loop.config import FitConfig
from tests.ranks import run_on_ranks
from tests.trainer.small import digest, sharded


def outcomes():
    """(is best, out of patience) of each of five evaluations, of which the third is not accepted."""
    best, found, kept = BestModel(FitConfig(metric="m", patience=2)), [], None
    for value, accepted in ((0.5, True), (0.4, True), (0.7, False), (0.6, True), (0.65, True)):
        update = best.update({"m": value}, accepted, kept)
        kept = update or kept
        found.append((update is not None, best.out_of_patience()))
    assert best.peak == 0.7
    return found


def test_patience_counts_all_evaluations_and_only_accepted_ones_are_best():
    expected = [(True, False), (False, False), (False, False), (True, False), (True, True)]
    assert run_on_ranks(outcomes, 1) == [expected]


def keeps():
    dmp, _ = sharded("warm-start")
    best, start = BestModel(FitConfig(metric="m")), digest(dmp)
    assert not best.has_weights
    assert best.peak == -math.inf
    best.take(dmp)
    for parameter in dmp.parameters():
        parameter.data.add_(1.0)
    assert digest(dmp) != start
    best.restore(dmp)
    return digest(dmp) == start


def test_the_best_weights_are_restored():
    assert run_on_ranks(keeps, 1) == [True]
