"""`train --model.tables.history`: no leak of validation rows, any number of ranks, bad input."""

import json
from dataclasses import replace

import pytest

from recpress.data.config import SynthConfig
from recpress.data.dataset.log import open_log
from recpress.data.errors import InputError
from recpress.data.sampling.histories import latest_items
from recpress.data.synthetic.interactions import synth
from recpress.modules.config import ALSConfig, TablesConfig, TwoTowerConfig
from recpress.trainer.config import EvaluationConfig, FollowConfig, TrainConfig
from recpress.trainer.evaluate.config import EvaluateConfig
from recpress.trainer.evaluate.stage import evaluate
from recpress.trainer.factorize.config import FactorizeConfig
from recpress.trainer.factorize.stage import factorize
from recpress.trainer.train import stage
from recpress.trainer.train.stage import train
from tests.ranks import run_on_ranks


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "log"
    synth(SynthConfig(users=500, items=300, rows=12_000, tastes=8, tastes_per_user=3), path)
    return str(path)


def config(log, out, history="only", **more):
    tables = {"strategy": "random", "dim": 16, "history": history, "history_length": 30} | more.pop("tables", {})
    given = TrainConfig(data=log, out=str(out), epochs=2, tensorboard=False, **more)
    return replace(given, model=replace(given.model, tables=TablesConfig(**tables)))


def trained_and_evaluated(given):
    found = train(given).metrics
    return found, evaluate(EvaluateConfig(data=given.data, model=given.out))


@pytest.mark.parametrize(("history", "ranks"), [("only", 1), ("add", 2)])
def test_a_saved_model_ranks_with_all_items_of_train(log, tmp_path, history, ranks):
    found = run_on_ranks(trained_and_evaluated, ranks, config(log, tmp_path / "model", history))
    for trained, loaded in found:
        assert trained == loaded == found[0][0]
    manifest = json.loads((tmp_path / "model" / "manifest.json").read_text())
    assert set(manifest["tables"]) == {"user_history", "item", *(["user"] if history == "add" else [])}
    assert manifest["validation"]["cases"] > 1000


def histories_of(given):
    """The items of the users in training, and those when the test rows are ranked."""
    seen = []

    def keeping(step):
        def call(inputs, model, *more, **options):
            seen.append([part.tolist() for part in model.builder._user_table.categorical["history"]])
            return step(inputs, model, *more, **options)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in ("_fit", "rank_test"):
            patch.setattr(stage, name, keeping(getattr(stage, name)))
        train(given)
    return seen


def test_validation_rows_are_no_items_of_their_users_until_the_end(log, tmp_path):
    given = config(log, tmp_path / "model", tables={"history_length": 400})
    ((training, testing),) = run_on_ranks(histories_of, 1, given)
    whole = latest_items(open_log(log), 400)
    assert testing == [whole.values.tolist(), whole.offsets.tolist()]
    held = len(whole.values) - len(training[0])
    assert held == pytest.approx(2000, rel=0.1)  # of 11,500 rows


def test_frozen_item_factors_alone_are_trained_without_a_fallback(log, tmp_path):
    als = ALSConfig(factors=8, auto=False)
    factorize(FactorizeConfig(data=log, out=str(tmp_path / "factors"), als=als, crossfit_rate=0.2))
    given = config(log, tmp_path / "model", tables={"strategy": "frozen"}, factors=str(tmp_path / "factors"))
    ((found, loaded),) = run_on_ranks(trained_and_evaluated, 1, given)
    assert found == loaded
    manifest = json.loads((tmp_path / "model" / "manifest.json").read_text())
    assert set(manifest["tables"]) == {"user_history", "item", "item_count"}
    assert not manifest["fallback"]
    assert found["HR@10"] > 0.3  # popularity: 0.2


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"hash": "maps"}, "history is 'only', expected none with hash"),
        ({"follow": FollowConfig(online=True)}, "history is 'only', expected none with follow"),
        ({"user_features": ("history",)}, "'history' is the key of the items of users"),
        ({"tables": {"strategy": "frozen+residual"}}, "frozen\\+residual adds to rows of users"),
        ({"tables": {"history_length": 0}}, "tables.history_length is 0, expected at least 1"),
    ],
)
def test_what_does_not_go_together_is_one_error(more, message):
    tables = TablesConfig(**{"history": "only", "strategy": "random"} | more.pop("tables", {}))
    with pytest.raises(InputError, match=message):
        TrainConfig(data="log", out="out", model=TwoTowerConfig(tables=tables), evaluation=EvaluationConfig(), **more)
