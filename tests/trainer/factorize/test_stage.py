"""`factorize` on logs whose ids have gaps: what it says of them."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed as dist

from recpress.data.config import IngestConfig
from recpress.data.dataset.log import open_log
from recpress.data.ingest.convert import ingest
from recpress.modules.als.factors import Factors, RowBlocks
from recpress.modules.config import ALSConfig
from recpress.trainer.factorize.config import FactorizeConfig
from recpress.trainer.factorize.stage import LARGE, _unused_ids, factorize
from tests.ranks import run_on_ranks

FAR = 500_000


@pytest.fixture(scope="module")
def gap(tmp_path_factory):
    """60 users and 51 items, one of which has a number far above the others."""
    rng = np.random.default_rng(0)
    users, items = rng.integers(60, size=600), rng.integers(50, size=600)
    items[0] = FAR
    folder = tmp_path_factory.mktemp("gap")
    pq.write_table(pa.table({"user_id": users, "item_id": items}), folder / "train.parquet")
    return str(folder)


def settings(log, out):
    return FactorizeConfig(data=str(log), out=str(out), als=ALSConfig(factors=4, sweeps=2, auto=False))


def test_a_log_that_uses_few_of_its_ids_is_warned_of(gap, tmp_path, caplog):
    factorize(settings(gap, tmp_path / "factors"))
    warned = [line for line in caplog.messages if "ingest" in line]
    assert len(warned) == 1
    for part in (gap, "51 of the item ids", f"{FAR:,}", "GiB", "negatives"):
        assert part in warned[0]
    assert "user" not in warned[0].replace(gap, "")


def test_a_log_that_was_ingested_is_not(gap, tmp_path, caplog):
    ingest(IngestConfig(input=gap + "/train.parquet"), tmp_path / "log")
    factorize(settings(tmp_path / "log", tmp_path / "factors"))
    assert "occur in train" not in caplog.text


def warned(gap):
    log = open_log(gap)
    rank, world = dist.get_rank(), dist.get_world_size()
    shards = [RowBlocks(log.num_ids(side), world).size(rank) for side in ("user", "item")]
    factors = Factors(*(torch.zeros(size, 4) for size in shards), log.num_users, log.num_items, rank, world)
    factors.user_counts, factors.item_counts = torch.ones(shards[0]), torch.zeros(shards[1])
    factors.item_counts[: LARGE // 8] = 1  # on two ranks: 5 % of all ids, on one 2.5 %
    return _unused_ids(log, factors)


def test_ids_of_all_ranks_count(gap):
    found = run_on_ranks(warned, 2, gap)
    assert f"{2 * (LARGE // 8):,} of the item ids" in found[0]
    assert found[1] == found[0]
