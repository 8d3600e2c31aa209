"""The inputs of a run: which sample, factors and maps it takes, and which settings do not go together."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recpress.data.config import NegativesConfig, SampleConfig
from recpress.data.errors import InputError
from recpress.modules.config import TablesConfig, TwoTowerConfig
from recpress.trainer.config import TrainConfig
from recpress.trainer.train.inputs import choose_crossfit, choose_factors, choose_sample, has_heldout
from recpress.trainer.train.stage import train

UNSEEN = SampleConfig(rate=0.2, seed=3)


def config(strategy="frozen", rate=0.0, seed=0, **more):
    model = TwoTowerConfig(tables=TablesConfig(strategy=strategy, dim=4))
    made = TrainConfig(data="log", out="model", model=model, epochs=1, tensorboard=False, **more)
    return replace(made, sample=replace(made.sample, rate=rate, seed=seed))


def drawn(strategy="frozen", seed=0, **more):
    return replace(config(strategy, **more), sample=SampleConfig(rate=0.2, seed=seed))


def log(part=False, **heldout):
    return SimpleNamespace(
        path="log", is_part=part, sample_of=None, test=heldout.get("test"), test_negatives=heldout.get("negatives")
    )


def factors(crossfit=UNSEEN):
    return SimpleNamespace(path="factors", crossfit=crossfit, dim=4, has_not_seen=lambda _, sample: sample == crossfit)


@pytest.mark.parametrize(
    ("given", "made", "part", "expected"),
    [
        (config(), factors(), False, UNSEEN),  # what the factors have not seen
        (config(), factors(None), False, SampleConfig(rate=0.1)),  # a tenth
        (config(seed=5), factors(), False, SampleConfig(rate=0.1, seed=5)),  # another draw than the unseen one
        (config(seed=3), factors(), False, UNSEEN),
        (config(), factors(), True, SampleConfig()),  # the log is a sample
        (config("warm-start"), factors(), False, SampleConfig()),
        (config("random"), None, False, SampleConfig()),
        (config(rate=0.3, seed=1), factors(), False, SampleConfig(rate=0.3, seed=1)),  # given
    ],
)
def test_the_sample_of_a_run(given, made, part, expected):
    assert choose_sample(given, log(part), made) == expected


def test_cross_fitted_factors_are_for_frozen_tables_and_their_own_sample():
    fits = drawn(seed=3)
    assert choose_crossfit(fits, log(), factors())
    assert not choose_crossfit(fits, log(), None)
    assert not choose_crossfit(drawn(seed=4), log(), factors())
    assert not choose_crossfit(drawn("warm-start", seed=3), log(), factors())
    assert not choose_crossfit(replace(fits, crossfit="no"), log(), factors())
    for strategy, seed, message in (("frozen", 4, "factors made without"), ("warm-start", 3, "frozen tables")):
        with pytest.raises(InputError, match=f"crossfit: expected {message}"):
            choose_crossfit(drawn(strategy, seed, crossfit="yes"), log(), factors())


def test_random_tables_take_no_factors_and_others_need_them():
    assert choose_factors(config("random"), log()) is None
    with pytest.raises(InputError, match=r"factors: given, but model\.tables\.strategy is 'random'"):
        choose_factors(config("random", factors="f"), log())
    with pytest.raises(InputError, match=r"factors: missing; model\.tables\.strategy 'frozen' starts from them"):
        choose_factors(config(), log())


def test_a_sample_of_a_log_is_not_ranked_on_its_own():
    ranks = SimpleNamespace(rank=0)
    assert not has_heldout(config(), log(), ranks)
    assert has_heldout(config(), log(test="rows"), ranks)
    assert not has_heldout(config(), log(part=True, test="rows"), ranks)
    assert has_heldout(config(), log(part=True, test="rows", negatives="rows"), ranks)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"negatives": NegativesConfig(kind="in-batch")}, "negatives.kind is 'in-batch'"),
        ({"use_label": True}, "use_label: expected schema.label"),
        ({"item_features": ("colour",)}, "colour"),
        ({"factors": "nowhere"}, "factors: given"),
    ],
)
def test_settings_that_do_not_go_together_are_one_error(tmp_path, changes, message):
    rng = np.random.default_rng(0)
    (tmp_path / "log").mkdir()
    table = pa.table({"user_id": rng.integers(0, 9, 90), "item_id": rng.integers(0, 9, 90)})
    pq.write_table(table, tmp_path / "log" / "train.parquet")
    given = replace(config("random"), data=str(tmp_path / "log"), out=str(tmp_path / "model"))
    with pytest.raises(ValueError, match=message) as error:
        train(replace(given, **changes))
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["log"]
