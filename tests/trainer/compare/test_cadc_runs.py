"""The strategies of `compare cadc`."""

from recpress.trainer.compare.cadc_runs import STRATEGIES


def test_only_frozen_factors_on_a_sample_are_cross_fitted():
    assert [s.key for s in STRATEGIES if s.factors] == ["train-sample", "cadc", "freeze-all", "paper"]
    assert [s.key for s in STRATEGIES if s.may_keep_factors] == ["train-sample", "cadc", "freeze-all"]
    assert [s.key for s in STRATEGIES if s.crossfit] == ["cadc"]
    assert [s.key for s in STRATEGIES if s.sampled] == ["random-sample", "train-sample", "cadc", "paper"]
