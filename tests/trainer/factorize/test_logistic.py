"""The logistic factorization finds planted tastes, on one rank and on two."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed as dist

from recpress.data.config import SampleConfig
from recpress.data.dataset.log import open_log
from recpress.modules.config import LogisticConfig
from recpress.trainer.distributed.process_group import Ranks
from recpress.trainer.factorize.logistic import factorize_logistic
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
