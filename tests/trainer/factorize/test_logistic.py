"""The logistic factorization finds planted tastes, on one rank and on two."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed as dist

from recpress.data.config import SampleConfig, Schema
from recpress.data.dataset.log import open_log
from recpress.data.errors import InputError
from recpress.modules.als.factors import FactorTable
from recpress.modules.config import LogisticConfig
from recpress.trainer.distributed.process_group import Ranks
from recpress.trainer.evaluate.metrics import pointwise_auc
from recpress.trainer.factorize.config import FactorizeConfig
from recpress.trainer.factorize.logistic import factorize_logistic
from recpress.trainer.factorize.stage import factorize
from tests.ranks import run_on_ranks

GROUPS, USERS, ITEMS = 4, 60, 40


def factorized(folder):
    ranks = Ranks(dist.get_rank(), dist.get_world_size(), torch.device("cpu"))
    config = LogisticConfig(factors=8, epochs=8, learning_rate=0.2)
    found = []
    for without in (None, SampleConfig(rate=0.2, seed=1)):
        factors, losses = factorize_logistic(
            config, open_log(folder), ranks, without=without, batch_size=256 // ranks.world_size
        )
        found.append((factors.users, factors.items, losses))
    return found


@pytest.mark.parametrize("world", [1, 2])
def test_users_score_their_own_group_higher(world, tmp_path):
    rng = np.random.default_rng(0)
    users = rng.integers(0, USERS, 3000)
    items = rng.integers(0, ITEMS // GROUPS, 3000) * GROUPS + users % GROUPS
    users[-1], items[-1] = USERS - 1, ITEMS - 1  # so that the log shows how many there are
    pq.write_table(pa.table({"user_id": users, "item_id": items}), tmp_path / "train.parquet", row_group_size=500)
    per_rank = run_on_ranks(factorized, world, str(tmp_path))
    for case in range(2):
        u = torch.cat([rank[case][0] for rank in per_rank])
        v = torch.cat([rank[case][1] for rank in per_rank])
        losses = per_rank[0][case][2]
        assert u.shape == (USERS, 10)
        assert v.shape == (ITEMS, 10)
        assert len(losses) == 8
        assert losses[-1] < losses[0]
        own = (torch.arange(USERS)[:, None] % GROUPS) == (torch.arange(ITEMS)[None] % GROUPS)
        scores = u @ v.T
        lowest_own = torch.where(own, scores, torch.inf).amin(1)
        highest_other = torch.where(own, -torch.inf, scores).amax(1)
        assert (lowest_own > highest_other).float().mean() > 0.9


def test_labels_take_the_place_of_negatives(tmp_path):
    """Rows with label 0 are as frequent as clicks, so that only the labels tell who likes what."""
    rng = np.random.default_rng(0)
    users, items = rng.integers(0, USERS, 4000), rng.integers(0, ITEMS, 4000)
    users[-1], items[-1] = USERS - 1, ITEMS - 1
    likes = users % GROUPS == items % GROUPS
    table = pa.table({"user_id": users, "item_id": items, "click": likes.astype(np.int8)})
    pq.write_table(table, tmp_path / "train.parquet")
    out = str(tmp_path / "factors")
    config = LogisticConfig(factors=8, epochs=20, learning_rate=0.2)
    given = {"schema": Schema(label="click"), "use_label": True, "method": "logistic", "logistic": config}
    factorize(FactorizeConfig(data=str(tmp_path / "train.parquet"), out=out, **given))
    u, v = (torch.from_numpy(np.array(FactorTable(out, side)[:])) for side in ("user", "item"))
    every = torch.cartesian_prod(torch.arange(USERS), torch.arange(ITEMS))
    scores = (u[every[:, 0]] * v[every[:, 1]]).sum(1)
    assert pointwise_auc(scores, (every[:, 0] % GROUPS == every[:, 1] % GROUPS).float()) > 0.95
    pq.write_table(table.set_column(2, "click", pa.array(likes * 5.0)), tmp_path / "train.parquet")
    with pytest.raises(InputError, match="1"):
        factorize(FactorizeConfig(data=str(tmp_path / "train.parquet"), out=f"{out}2", **given))
