"""The curve of a trial."""

from types import SimpleNamespace

from recpress.trainer.compare.cadc_choose import _curve
from recpress.trainer.compare.cadc_result import CurvePoint
from recpress.trainer.compare.cadc_runs import STRATEGIES

BY_KEY = {strategy.key: strategy for strategy in STRATEGIES}
FACTORS = CurvePoint(seconds=3.0, epoch=0, metrics={"NDCG@10": 0.40})


def trial(best):
    evaluations = [{"epoch": n, "train_seconds": 10.0 * n, "NDCG@10": round(0.3 + n / 100, 2)} for n in range(4)]
    return SimpleNamespace(
        setup_seconds=1.0, fit=SimpleNamespace(evaluations=evaluations), best_epoch=best, metrics={"NDCG@10": 0.5}
    )


def curve(key, best=2):
    return [(p.epoch, p.seconds, p.metrics["NDCG@10"]) for p in _curve(BY_KEY[key], trial(best), 5, "NDCG@10", FACTORS)]


def test_random_tables_have_a_point_per_evaluation_after_the_set_up():
    assert curve("random-all") == [(0, 6, 0.30), (1, 16, 0.31), (2, 26, 0.32), (3, 36, 0.33)]


def test_what_starts_from_factors_has_their_quality_when_these_are_made():
    assert curve("freeze-all")[:2] == [(0, 3, 0.40), (1, 16, 0.31)]


def test_with_cross_fitting_only_the_factors_and_the_published_model_are_comparable():
    assert curve("cadc") == [(0, 3, 0.40), (2, 26, 0.5)]
    assert curve("cadc", best=0) == [(0, 3, 0.40)]
