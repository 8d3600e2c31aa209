"""`recpress plan`: formulas against known answers and real modules, the search, bad input."""

import json
from dataclasses import replace

import pytest
import torch
from torch import nn

from recpress.data.config import NegativesConfig, SampleConfig, StreamConfig, SynthConfig
from recpress.data.errors import InputError
from recpress.data.synthetic.interactions import synth
from recpress.modules.config import ALSConfig, TablesConfig, TowersConfig, TwoTowerConfig
from recpress.modules.hashing.id_map import IdMap
from recpress.modules.hashing.learned_hash import LearnedHash
from recpress.trainer.cli import main
from recpress.trainer.config import CheckpointConfig, TrainConfig
from recpress.trainer.factorize.config import FactorizeConfig
from recpress.trainer.factorize.stage import factorize
from recpress.trainer.plan.config import ClusterConfig, PlanConfig
from recpress.trainer.plan.job import MapShape, job_of
from recpress.trainer.plan.memory import peak, rank_lines
from recpress.trainer.plan.meta_model import MetaTowers, activation_bytes, shards_by_rank
from recpress.trainer.plan.sizing import MOST_RANKS, assess, smallest
from recpress.trainer.plan.stage import plan
from recpress.trainer.train.stage import train
from tests.ranks import run_on_ranks

GIB = 1 << 30


def config(users=1_000_000, items=100_000, strategy="frozen", storage="fp32", **changes):
    tables = TablesConfig(strategy=strategy, storage=storage, dim=128)
    return PlanConfig(users=users, items=items, dim=128, model=TwoTowerConfig(tables=tables), **changes)


def line(lines, name):
    (found,) = (entry["bytes"] for entry in lines if entry["name"] == name)
    return found


def one_rank(**changes):
    return plan(config(cluster=ClusterConfig(ranks_per_node=1), compare=False, **changes))["lines"]


@pytest.mark.parametrize(
    ("storage", "bytes_of_row", "bytes_of_count"),
    [("fp32", 512, 16), ("fp16", 256, 16), ("int8", 136, 16), ("int4", 80, 16)],  # on CUDA int4 is padded to 16
)
def test_frozen_tables_take_the_bytes_of_their_rows(storage, bytes_of_row, bytes_of_count):
    assert line(one_rank(storage=storage), "frozen tables") == 1_100_000 * (bytes_of_row + bytes_of_count)


def test_trained_tables_have_four_bytes_of_state_a_row():
    lines = one_rank(strategy="random")
    assert line(lines, "trainable tables") == 1_100_000 * 512
    assert line(lines, "optimizer state") == 1_100_000 * 4
    assert not any(entry["name"] == "frozen tables" for entry in lines)


def test_uploads_take_memory_where_checkpoints_go_to_a_store():
    def upload(**changes):
        return [entry["bytes"] for entry in one_rank(**changes) if entry["name"] == "upload of a checkpoint"]

    remote = CheckpointConfig(folder="s3://bucket/run")
    assert upload(strategy="random") == upload(strategy="random", checkpoint=CheckpointConfig(folder="run")) == []
    assert upload(strategy="random", checkpoint=remote) == upload(strategy="random", out="s3://bucket/x") == [224 << 20]
    small = one_rank(checkpoint=remote)  # frozen tables are not in it
    assert line(small, "upload of a checkpoint") == line(small, "copy for checkpoints") < 224 << 20


@pytest.mark.parametrize(("strategy", "trained"), [("random", 1_100_000 * 516), ("frozen", 0)])
def test_a_checkpoint_is_copied_in_host_memory_without_frozen_tables_and_gradients(strategy, trained):
    found = plan(config(strategy=strategy, cluster=ClusterConfig(ranks_per_node=1), compare=False))
    copy, dense = line(found["lines"], "copy for checkpoints"), line(found["lines"], "dense part")
    assert copy == trained + dense * 3 // 4  # weights and two moments, without gradients
    host, device = found["peaks"]["host"], found["peaks"]["device"]
    assert host["checkpoint"] - host["train"] == copy
    assert device["checkpoint"] == device["train"]


@pytest.mark.parametrize(("rows_per_id", "weighted"), [(1, False), (2, False), (2, True)])
def test_a_map_is_as_large_as_the_module_that_holds_it(rows_per_id, weighted):
    weights = torch.ones(50, rows_per_id, dtype=torch.float16) if weighted else None
    id_map = IdMap(rows=torch.zeros(50, rows_per_id, dtype=torch.int32), num_rows=7, weights=weights)
    assert MapShape.of(id_map).nbytes == LearnedHash({"user": id_map}).nbytes()


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


def test_all_rows_lie_on_some_rank_and_the_heaviest_rank_is_shown():
    job = job_of(config(users=10_000_000))
    model, cluster = MetaTowers(job), ClusterConfig(nodes=2, ranks_per_node=4, memory_gib=8)
    need = assess(job, model, cluster, 0)
    assert need.problem is None
    ranks = shards_by_rank(model, need.layout, cluster.world)
    assert sum(s.nbytes(True) for shards in ranks for s in shards) == 10_100_000 * (512 + 16)
    options = {"world": 8, "cuda": True, "context": int(cluster.context_gib * GIB), "activations": 0}
    assert need.rank_bytes("device") == max(peak(rank_lines(job, model, s, **options), "device") for s in ranks)


def test_what_does_not_fit_is_told(capsys):
    result = plan(config(users=1_000_000_000, cluster=ClusterConfig(nodes=1, ranks_per_node=1)))
    assert not result["fits"]
    assert "DOES NOT FIT: TorchRec's planner finds no plan" in capsys.readouterr().out
    small = {name: row["smallest"]["ranks"] for name, row in result["variants"].items()}
    assert small["frozen int8"] < small["frozen fp32"] <= small["trainable"]
    assert small["learned hash 25 %, frozen int8"] < small["frozen int8"]


def test_no_number_of_ranks_helps_where_a_replicated_part_is_too_large():
    job = job_of(
        config(rows=20_000_000_000, negatives=NegativesConfig(reject_positives="yes"))
    )  # 160 GB of pairs on each rank
    model = MetaTowers(job)
    found = smallest(job, model, ClusterConfig(), 0)
    assert found.ranks is None
    assert "a rank needs" in found.why


def test_the_smallest_cluster_fits_and_a_smaller_one_does_not():
    job = job_of(config(users=600_000_000))  # 307 GB: 56 GiB of tables a GPU at most
    model = MetaTowers(job)
    found = smallest(job, model, ClusterConfig(ranks_per_node=8), 0)
    assert found.checked
    assert found.ranks == 6
    fewer = ClusterConfig(ranks_per_node=found.ranks - 1)
    assert assess(job, model, fewer, 0).problem is not None
    assert found.ranks < MOST_RANKS


def test_a_billion_users_on_64_gpus(tmp_path):
    out = tmp_path / "plan.json"
    result = plan(config(users=1_000_000_000, json=str(out), cluster=ClusterConfig(nodes=8)))
    assert json.loads(out.read_text())["peaks"] == result["peaks"]
    assert len(result["variants"]) == 6
    maps = result["variants"]["learned hash 25 %, frozen fp32"]["maps_per_rank"]
    assert maps == 1_000_100_000 * 5  # 4 bytes of map and 1 of log count, on every rank


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


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"nodes": 0}, "nodes is 0"),
        ({"ranks_per_node": -1}, "ranks_per_node is -1"),
        ({"memory_gib": 0.0}, "cluster.memory_gib is 0.0"),
        ({"host_memory_gib": float("nan")}, "cluster.host_memory_gib is nan"),
        ({"inter_gb_s": -2.0}, "cluster.inter_gb_s is -2.0"),
    ],
)
def test_clusters_that_cannot_be_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        ClusterConfig(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "--users and --items"),
        ({"users": 5, "items": 5, "data": "x"}, "users: set together with data"),
        ({"users": 5, "items": 5, "factors": "x"}, "expected data"),
        ({"users": 5, "items": 5, "share": 0.0}, "share is 0"),
        ({"users": 5, "items": 5, "user_features": ("age",)}, "expected data"),
    ],
)
def test_jobs_that_cannot_be_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        PlanConfig(**changes)


def test_on_the_command_line(tmp_path, capsys):
    file = tmp_path / "train.toml"
    file.write_text('data = ""\nseed = 3\nepochs = 2\n[model.tables]\nstorage = "int8"\n')
    options = ["--users", "1000000", "--items", "1000", "--dim", "64", "--cluster.nodes", "2", "--no-compare"]
    assert main(["plan", "--config", str(file), *options]) == 0
    out = capsys.readouterr().out
    assert "2 x 8 = 16 GPUs" in out
    assert "int8" in out
    assert "not counted: 8 bytes per interaction" in out
    assert main(["plan", "--users", "1000", "--items", "500", "--dim", "8"]) == 0  # compares variants
    assert "frozen int8" in capsys.readouterr().out
    assert main(["plan", "--users", "5", "--items", "5", "--cluster.nodes", "0"]) == 2
    assert "nodes is 0, expected at least 1" in capsys.readouterr().err
