"""Sizes of a job, from a log or from options."""

from dataclasses import replace

import pytest
import torch

from recpress.data.config import SampleConfig, SynthConfig
from recpress.data.synthetic.interactions import synth
from recpress.modules.config import ALSConfig
from recpress.modules.hashing.id_map import IdMap
from recpress.modules.hashing.learned_hash import LearnedHash
from recpress.trainer.config import TrainConfig
from recpress.trainer.factorize.config import FactorizeConfig
from recpress.trainer.factorize.stage import factorize
from recpress.trainer.plan.config import ClusterConfig, PlanConfig
from recpress.trainer.plan.job import MapShape, job_of
from recpress.trainer.plan.stage import plan
from recpress.trainer.train.stage import train
from tests.trainer.plan.jobs import line


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    made = SynthConfig(users=300, items=200, rows=9_000, tastes=8, tastes_per_user=4, held_out_users=0)
    return str(synth(made, tmp_path_factory.mktemp("log") / "log"))


def test_a_log_and_its_factors_say_the_sizes(log, tmp_path):
    factors = str(tmp_path / "factors")
    factorize(FactorizeConfig(data=log, out=factors, als=ALSConfig(factors=16, sweeps=2)))
    made = PlanConfig(data=log, factors=factors, sample=SampleConfig(rate=0.5))
    job = job_of(made)
    assert (job.user.ids, job.item.ids, job.rows, job.dim) == (300, 200, 9_000, 16)
    assert job.sampled == pytest.approx(4500, rel=0.1)
    options = {"data": log, "factors": factors, "out": str(tmp_path / "model"), "tensorboard": False}
    trained = train(TrainConfig(**options, device="cpu"))
    planned = plan(replace(made, compare=False, cluster=ClusterConfig(device="cpu", ranks_per_node=1)))
    assert trained.table_bytes == line(planned["lines"], "frozen tables")


@pytest.mark.parametrize(("rows_per_id", "weighted"), [(1, False), (2, False), (2, True)])
def test_a_map_is_as_large_as_the_module_that_holds_it(rows_per_id, weighted):
    weights = torch.ones(50, rows_per_id, dtype=torch.float16) if weighted else None
    id_map = IdMap(rows=torch.zeros(50, rows_per_id, dtype=torch.int32), num_rows=7, weights=weights)
    assert MapShape.of(id_map).nbytes == LearnedHash({"user": id_map}).nbytes()
