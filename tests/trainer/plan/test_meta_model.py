"""The model as shapes, its activations and its shards."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from recpress.data.config import NegativesConfig, StreamConfig
from recpress.modules.config import TowersConfig
from recpress.trainer.plan.config import ClusterConfig
from recpress.trainer.plan.job import job_of
from recpress.trainer.plan.meta_model import MetaTowers, activation_bytes, shards_by_rank
from recpress.trainer.plan.sizing import assess
from tests.ranks import run_on_ranks
from tests.trainer.plan.jobs import config


def test_dense_part_is_that_of_the_network():
    towers = TowersConfig(kind="mlp", hidden=(32,), dim=16)
    made = config()
    job = job_of(replace(made, model=replace(made.model, towers=towers)))
    model = MetaTowers(job)
    tower = 128 * 32 + 32 + 32 * 16 + 16
    assert sum(p.numel() for p in model.dense()) == 2 * tower + 2  # + scale and offset of the logit
    assert all(p.device.type == "meta" for p in model.parameters())


def test_activations_are_those_of_a_known_network():
    """A batch twice as large needs twice as much, and the hidden layers are kept a few times over."""
    made = config(negatives=NegativesConfig(count=4))
    sizes = []
    for batch in (1000, 2000):
        job = job_of(replace(made, stream=StreamConfig(batch_size=batch)))
        sizes.append(activation_bytes(job, MetaTowers(job)))
    assert sizes[1] / sizes[0] == pytest.approx(2, rel=0.05)
    hidden = 2000 * (1 + 5) * 256 * 4  # of users and items
    assert 3 * hidden < sizes[1] < 9 * hidden


def shard_sizes():
    """What two ranks hold of a random table, and what the plan said they would."""
    from recpress.trainer.model.sharding import shard

    job = job_of(config(users=4000, items=1000, strategy="random"))
    model = MetaTowers(job)
    cluster = ClusterConfig(device="cpu", ranks_per_node=2, host_memory_gib=2)
    need = assess(job, model, cluster, 0)
    dmp = shard(
        nn.ModuleDict({"user": model.user_tables, "item": model.item_tables}), torch.device("cpu"), batch_size=64
    )
    held = sum(s.tensor.nbytes for w in dmp.state_dict().values() for s in w.local_shards())
    gathered = [torch.zeros(1) for _ in range(2)]
    torch.distributed.all_gather(gathered, torch.tensor([float(held)]))
    ranks = shards_by_rank(model, need.layout, 2)
    return sum(float(g) for g in gathered), sum(s.nbytes(False) for shards in ranks for s in shards)


def test_a_plan_speaks_of_the_bytes_that_sharding_makes():
    for held, said in run_on_ranks(shard_sizes, 2):
        assert held == said == 5000 * 512
