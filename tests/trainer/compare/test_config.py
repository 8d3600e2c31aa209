"""Options of the comparisons that cannot be used."""

from __future__ import annotations

import pytest

from recpress.data.errors import InputError
from recpress.trainer.compare import bpr
from recpress.trainer.compare.config import MAX_TRIALS, TRIALS, CompareBothConfig, CompareCadcConfig, changed


def test_levels_and_rates_out_of_range_are_refused() -> None:
    with pytest.raises(InputError, match=r"levels: 1\.5, expected numbers in \(0, 1\]"):
        CompareBothConfig(levels=(1.5,))
    with pytest.raises(InputError, match=r"rates: 0\.0"):
        CompareBothConfig(rates=(0.0,))


@pytest.mark.parametrize("trials", [0, 4])
def test_an_impossible_number_of_trials_is_refused(trials):
    with pytest.raises(InputError, match="trials"):
        CompareCadcConfig(trials=trials)


def test_each_network_has_as_many_trials():
    assert {len(changes) for changes in TRIALS.values()} == {MAX_TRIALS} == {len(bpr.TRIALS)}
    config = CompareCadcConfig()
    for name, changes in TRIALS.items():
        assert changed(getattr(config, name), changes[0]) == getattr(config, name)
    other = changed(config.random, {"batch_size": 512, "dropout": 0.5, "learning_rate": 3e-3})
    assert (other.stream.batch_size, other.model.towers.dropout, other.optimizer.learning_rate) == (512, 0.5, 3e-3)
    assert other.model.tables == config.random.model.tables


def test_the_strategies_that_others_are_compared_with_are_always_run():
    assert CompareCadcConfig(strategies=("core-sample",)).chosen_strategies == ("random-all", "cadc", "core-sample")
    with pytest.raises(InputError, match="strategies: 'core'"):
        CompareCadcConfig(strategies=("core",))
