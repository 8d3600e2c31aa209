"""The networks of a run: what it trains, and one that ranks as the factorization does."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from recpress.data.config import NegativesConfig, SampleConfig, StreamConfig
from recpress.data.dataset.log import open_log
from recpress.data.errors import InputError
from recpress.data.negatives.samplers import PopularityNegatives, UniformNegatives
from recpress.modules.config import LossConfig
from recpress.trainer.config import TrainConfig
from recpress.trainer.distributed.process_group import Ranks
from recpress.trainer.model.two_tower import Features
from recpress.trainer.train.networks import Networks
from tests.ranks import run_on_ranks
from tests.trainer.small import CPU, DIM, ITEMS, USERS, config, factors

RANKS = Ranks(rank=0, world_size=1, device=CPU)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("log")
    users, items = np.arange(240) % USERS, np.arange(240) * 7 % ITEMS  # a fifth of all pairs: dense
    pq.write_table(pa.table({"user_id": users, "item_id": items}), path / "train.parquet")
    return path


def networks(folder, model, negatives=None, with_factors=True):
    given = TrainConfig(data=str(folder), out="model", model=model, negatives=negatives or NegativesConfig(count=2))
    given = replace(given.resolved(), model=model, stream=StreamConfig(batch_size=8), sample=SampleConfig())
    tables = {"user": factors()[0], "item": factors()[1]}
    made = SimpleNamespace(
        dim=DIM,
        table=lambda side, crossfit=False: tables[side] * (2.0 if crossfit else 1.0),
        counts=lambda side, crossfit=False: np.ones((len(tables[side]), 1), np.float32),
        crossfit=None,
    )
    log = open_log(folder)
    features = Features.of(log, (), ())
    factors_ = made if with_factors else None
    opened = SimpleNamespace(config=given, log=log, factors=factors_, features=features, maps={}, hashed=None)
    return Networks(opened, RANKS)


def scores(model):
    users, items = model.vectors("user")(torch.arange(USERS)), model.vectors("item")(torch.arange(ITEMS))
    return (users @ items.T).detach().numpy()


def like_factors(folder):
    made = networks(folder, config("frozen", kind="mlp"))
    assert made.residual().towers.kind == "residual"
    return scores(made.like_factorization(crossfit=False)), scores(made.like_factorization(crossfit=True))


def test_a_network_that_ranks_as_the_factorization_does(folder):
    ((found, crossfit),) = run_on_ranks(like_factors, 1, folder)
    expected = factors()[0] @ factors()[1].T
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(crossfit, 4 * expected, rtol=1e-4, atol=1e-5)  # both tables are twice as large


def negatives_of(folder, negatives, loss):
    made = networks(folder, replace(config("random", kind="mlp"), loss=loss), negatives, with_factors=False)
    model = made.build(made.inputs.config.model)
    made.load_factors(model, crossfit=False)  # there are none
    return model.builder.negatives


def test_negatives_follow_the_configuration(folder):
    plain = NegativesConfig(count=2, reject_positives="no")
    (uniform,) = run_on_ranks(negatives_of, 1, folder, plain, LossConfig())
    assert (type(uniform), uniform.count, uniform.reject) == (UniformNegatives, 2, None)
    (rejecting,) = run_on_ranks(negatives_of, 1, folder, replace(plain, reject_positives="auto"), LossConfig())
    assert rejecting.reject.contains(torch.tensor([0, 0]), torch.tensor([0, 1])).tolist() == [True, False]
    popular = replace(plain, kind="popularity")
    (drawn,) = run_on_ranks(negatives_of, 1, folder, popular, LossConfig())
    assert type(drawn) is PopularityNegatives
    with pytest.raises(InputError, match=r"negatives\.kind is 'in-batch': expected model\.loss\.kind 'softmax'"):
        run_on_ranks(negatives_of, 1, folder, NegativesConfig(kind="in-batch"), LossConfig())
