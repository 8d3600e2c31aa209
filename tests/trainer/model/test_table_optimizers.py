"""Optimizers of tables against torch's own, a learning rate per table, and devices that lack one."""

import pytest
import torch
from fbgemm_gpu.split_table_batched_embeddings_ops_training import SplitTableBatchedEmbeddingBagsCodegen
from torch import nn
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor
from torchrec.distributed.embeddingbag import ShardedEmbeddingBagCollection

from recpress.data.errors import InputError
from recpress.trainer.config import OptimizerConfig
from recpress.trainer.loop.optimizer import TrainOptimizer
from recpress.trainer.model.sharding import shard
from recpress.trainer.model.table_optimizers import TABLE_OPTIMIZERS, check_table_optimizer
from tests.ranks import run_on_ranks
from tests.trainer.small import CPU, sharded

ROWS, DIM, RATE = 12, 8, 0.1


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        tables = [EmbeddingBagConfig(name=n, num_embeddings=ROWS, embedding_dim=DIM, feature_names=[n]) for n in "ab"]
        self.tables = EmbeddingBagCollection(tables, device=torch.device("meta"))
        self.weight = nn.Parameter(torch.ones(2 * DIM))

    def forward(self, features):
        return (self.tables(features).values() @ self.weight).square().sum()


def made(optimizer, rates=None):
    dmp = shard(Model(), CPU, batch_size=4, learning_rate=RATE, optimizer=optimizer, learning_rates=rates)
    settings = OptimizerConfig(tables=optimizer, schedule="linear", learning_rate=0.0)
    return dmp, TrainOptimizer(dmp, settings, total_steps=4)


def rows(dmp):
    state = dmp.state_dict()
    return [state[f"tables.embedding_bags.{n}.weight"].local_shards()[0].tensor for n in "ab"]


def against_torch(name, kind, rates):
    dmp, optimizer = made(name, rates)
    twins = [nn.Parameter(tensor.detach().clone()) for tensor in rows(dmp)]
    settings = {} if name == "sgd" else {"eps": 1e-8}
    each = [kind([twin], lr=(rates or {}).get(n, RATE), **settings) for n, twin in zip("ab", twins, strict=True)]
    generator = torch.Generator().manual_seed(3)
    for step in range(3):
        ids = torch.randint(ROWS, (8,), generator=generator)
        features = KeyedJaggedTensor(["a", "b"], ids, lengths=torch.ones(8, dtype=torch.int64))
        optimizer.zero_grad()
        dmp(features).backward()
        optimizer.step()
        vectors = torch.cat([twins[0][ids[:4]], twins[1][ids[4:]]], 1)
        for other in each:
            other.zero_grad()
        vectors.sum(1).square().sum().backward()
        for n, other in zip("ab", each, strict=True):
            other.param_groups[0]["lr"] = (rates or {}).get(n, RATE) * (1 - step / 4)
            other.step()
    for found, twin in zip(rows(dmp), twins, strict=True):
        torch.testing.assert_close(found, twin.detach(), rtol=1e-4, atol=1e-6)
    sizes = TABLE_OPTIMIZERS[name]
    states = [value for values in optimizer.fused.state_dict()["state"].values() for value in values.values()]
    numbers = sum(shard.tensor.numel() for value in states for shard in value.local_shards())
    assert numbers == 2 * ROWS * (sizes.per_row + DIM * sizes.per_value)


@pytest.mark.parametrize("rates", [None, {"b": 0.01}, {"a": 0.0}])
@pytest.mark.parametrize(("name", "kind"), [("sgd", torch.optim.SGD), ("adagrad", torch.optim.Adagrad)])
def test_tables_move_as_with_torchs_optimizer_and_the_rates_of_each_table(name, kind, rates):
    run_on_ranks(against_torch, 1, name, kind, rates)


def counts():
    """Updates that tables have had, as FBGEMM sees them at the next batch; evaluations do not count."""
    dmp, _ = sharded("random")
    optimizer = TrainOptimizer(dmp, OptimizerConfig(tables="adam"), 9)  # the numbers alone: CPUs have no such kernel
    optimizer.resume(3, batches=6)
    collections = (module for module in dmp.modules() if isinstance(module, ShardedEmbeddingBagCollection))
    lookups = (module for collection in collections for lookup in collection._lookups for module in lookup.modules())
    kernels = [module for module in lookups if isinstance(module, SplitTableBatchedEmbeddingBagsCodegen)]
    assert len(kernels) == 2  # of users and of items
    found = []
    for _ in range(2):
        for kernel in kernels:
            kernel.iter_cpu.add_(100)
        optimizer.zero_grad()
        found.append({(int(kernel.iter), int(kernel.iter_cpu)) for kernel in kernels})
        optimizer.step()
    return found


def test_updates_are_counted_without_evaluations_and_after_a_resume():
    assert run_on_ranks(counts, 1) == [[{(6, 6)}, {(7, 7)}]]


def test_optimizers_that_only_gpus_have():
    for name, kind in TABLE_OPTIMIZERS.items():
        check_table_optimizer(name, "cuda")
        if kind.cpu:
            check_table_optimizer(name, "cpu")
            continue
        with pytest.raises(InputError, match=f"{name}, which FBGEMM has on GPUs only.*row-wise-adagrad, adagrad, sgd"):
            check_table_optimizer(name, "cpu")


def test_the_state_in_words():
    found = {name: kind.state for name, kind in TABLE_OPTIMIZERS.items()}
    assert found["row-wise-adagrad"] == "4 B per row"
    assert found["row-wise-adam"] == "4 B x dim + 4 B per row"
    assert found["adam"] == "8 B x dim per row"
    assert found["sgd"] == "none"
