"""Defaults that depend on the tables: given settings stay, the others suit the strategy."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from recpress.data.config import SampleConfig, StreamConfig
from recpress.data.errors import InputError
from recpress.modules.config import TablesConfig, TowersConfig
from recpress.trainer.cli import _config
from recpress.trainer.config import DEFAULTS, EvaluationConfig, FollowConfig, NetworkConfig, TrainConfig, network_for
from recpress.trainer.train.config import TrainModelConfig
from recpress.trainer.train.inputs import choose_sample

FACTORS = SimpleNamespace(crossfit=None)
PART = SimpleNamespace(is_part=True)
WHOLE = SimpleNamespace(is_part=False)


def asked(*arguments):
    return _config("train", ["--data", "log", "--out", "out", *arguments])


def test_without_factors_tables_are_random_and_all_rows_are_trained_on():
    config = asked().resolved()
    assert config.model.tables == TablesConfig(strategy="random")
    assert (config.model.towers.dropout, config.model.towers.penalty, config.epochs) == (0.1, 0.0, 40)
    assert (config.optimizer.schedule, config.stream.batch_size) == ("constant", 1024)
    assert choose_sample(config, WHOLE, None) == SampleConfig(rate=1.0)


def test_with_factors_tables_are_frozen_and_a_tenth_is_trained_on():
    config = asked("--factors", "f").resolved()
    assert config.model.tables == TablesConfig(strategy="frozen")
    assert (config.model.towers.dropout, config.optimizer.schedule, config.stream.batch_size) == (0.7, "cosine", 2048)
    assert choose_sample(config, WHOLE, FACTORS) == SampleConfig(rate=0.1)
    assert choose_sample(config, PART, FACTORS) == SampleConfig(rate=1.0)


def test_what_is_asked_for_stays():
    options = [
        "--model.towers.dropout",
        "0.7",
        "--optimizer.schedule",
        "linear",
        "--epochs",
        "2",
        "--sample.rate",
        "0.3",
    ]
    config = asked(*options, "--stream.batch-size", "64", "--evaluation.every", "0").resolved()
    assert (config.model.towers.dropout, config.optimizer.schedule, config.epochs) == (0.7, "linear", 2)
    assert (config.stream.batch_size, config.optimizer.learning_rate, config.evaluation.every) == (64, 3e-3, 0)
    assert choose_sample(config, WHOLE, None) == SampleConfig(rate=0.3)
    assert config.resolved() == config


@pytest.mark.parametrize("strategy", DEFAULTS)
def test_every_strategy_has_its_defaults_and_no_gaps(strategy):
    network = network_for(strategy, NetworkConfig())
    assert network.model.tables.strategy == strategy
    assert type(network.stream) is StreamConfig
    assert type(network.model.towers) is TowersConfig
    for section in (network.stream, network.optimizer, network.model.towers, network.model.tables):
        assert None not in vars(section).values()


@pytest.mark.parametrize(
    ("sample", "unseen", "chosen"),
    [
        ([], SampleConfig(rate=0.2, seed=3), SampleConfig(rate=0.2, seed=3)),
        ([], SampleConfig(kind="block", rate=0.2), SampleConfig(kind="block", rate=0.2)),
        (["--sample.seed", "3"], SampleConfig(rate=0.2, seed=3), SampleConfig(rate=0.2, seed=3)),
        (["--sample.seed", "4"], SampleConfig(rate=0.2, seed=3), SampleConfig(rate=0.1, seed=4)),
        (["--sample.rate", "0.5"], SampleConfig(rate=0.2, seed=3), SampleConfig(rate=0.5)),
    ],
)
def test_the_sample_that_cross_fitted_factors_have_not_seen_is_the_default(sample, unseen, chosen):
    config = asked("--factors", "f", *sample).resolved()
    assert choose_sample(config, WHOLE, SimpleNamespace(crossfit=unseen)) == chosen


def test_factors_that_are_trained_on_take_all_rows():
    config = asked("--factors", "f", "--model.tables.strategy", "warm-start").resolved()
    assert config.optimizer.table_learning_rate == 0.01
    assert choose_sample(config, WHOLE, FACTORS) == SampleConfig(rate=1.0)


def test_a_log_that_is_followed_has_no_end_to_choose_at():
    config = TrainConfig(data="log", out="out", follow=FollowConfig(online=True)).resolved()
    assert (config.optimizer.schedule, config.evaluation.every) == ("constant", 0)
    assert TrainConfig(data="log", out="out").resolved().evaluation.every == 1


@pytest.mark.parametrize("rate", ["-0.1", "1.5", "nan"])
def test_a_rate_out_of_range_is_refused(rate):
    with pytest.raises((InputError, SystemExit)):
        asked("--sample.rate", rate)


def test_a_file_may_set_what_is_left_out_by_default(tmp_path):
    path = tmp_path / "train.toml"
    path.write_text("[sample]\nrate = 0.25\n[model.towers]\ndropout = 0.3\n[evaluation]\nevery = 2\n")
    config = asked("--config", str(path))
    assert (config.sample.rate, config.model.towers.dropout, config.evaluation.every) == (0.25, 0.3, 2)


def test_sections_may_be_given_plain():
    config = replace(asked(), model=replace(asked().model, towers=TowersConfig()), evaluation=EvaluationConfig())
    assert config.resolved().model.towers == TowersConfig()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"accumulate": 0}, "accumulate is 0, expected at least 1"),
        ({"ema": 1.0}, r"ema is 1.0, expected a number in \(0, 1\)"),
        ({"ema": 0.0}, r"ema is 0.0, expected a number in \(0, 1\)"),
        ({"ema": float("nan")}, r"ema is nan, expected a number in \(0, 1\)"),
    ],
)
def test_bad_settings_of_steps_are_refused_for_every_model(settings, message):
    for kind in (TrainConfig, TrainModelConfig):
        with pytest.raises(InputError, match=message):
            kind(data="log", out="model", **settings)


def test_steps_are_counted_by_epoch():
    config = TrainConfig(data="log", out="model", accumulate=4)
    assert [config.total_steps(batches, 3) for batches in (1, 4, 5, 8)] == [3, 3, 6, 6]
