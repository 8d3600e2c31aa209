"""Which network is published, from the evaluations of a run."""

import logging
from types import SimpleNamespace

import pytest

from recpress.trainer.loop.config import FitResult
from recpress.trainer.train.outcome import choose_published


def choice(start, popularity=0.1):
    metrics = None if start is None else {"NDCG@10": start, "HR@10": 2 * start}
    return SimpleNamespace(
        metric="NDCG@10",
        companion="HR@10",
        start=metrics,
        popularity={"NDCG@10": popularity},
        num_cases=500,
        describe=lambda: {"cases": 500},
    )


def fitted(*values, best):
    found = [{"NDCG@10": v, "HR@10": 2 * v, "step": 10 * k, "epoch": k} for k, v in enumerate(values)]
    return FitResult(evaluations=found, best=found[best])


@pytest.mark.parametrize(
    ("start", "values", "best", "expected", "says"),
    [
        (0.3, (0.3, 0.35), 1, (1, False), "the network improves on the factorization on 500 validation rows: NDCG@10"),
        (0.3, (0.3, 0.28), 0, (0, True), "the network did not improve on the factorization"),
        (0.3, (0.3,), 0, (0, True), "no network was trained: the factorization's ranking is kept"),
        (None, (0.1, 0.2), 1, (1, False), ""),
        (None, (0.05, 0.08), 1, (1, False), "ranks no better than popularity on 500 validation rows"),
        (0.08, (0.08, 0.07), 0, (0, True), "so do the factors"),
    ],
)
def test_what_is_published_and_what_is_logged(start, values, best, expected, says, caplog):
    caplog.set_level(logging.INFO, "recpress")
    found = choose_published(choice(start), fitted(*values, best=best))
    assert (found["best_epoch"], found["fallback"]) == expected
    assert found["validation"]["published"] == (start if expected[1] else values[best])
    assert says in caplog.text


def test_without_validation_rows_nothing_is_chosen():
    assert choose_published(None, FitResult()) == {"best_epoch": None, "fallback": False, "validation": {}}
