"""Quantized communication: values, the bytes that cross ranks, and precisions that a backend lacks."""

import pytest
import torch
import torch.distributed as dist
from fbgemm_gpu.split_embedding_configs import SparseType
from torch import nn
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor

from recpress.data.errors import InputError
from recpress.modules.frozen.collection import FrozenEmbeddingBagCollection
from recpress.modules.frozen.kernel import FrozenTable
from recpress.trainer.config import CommunicationConfig
from recpress.trainer.model import communication
from recpress.trainer.model.sharding import plan, shard
from tests.ranks import run_on_ranks

DIM, ROWS, BATCH = 12, 40, 7
CPU = torch.device("cpu")
KINDS = {"a": "table_wise", "b": "column_wise", "c": "row_wise", "frozen": "row_wise", "whole": "table_wise"}
COLLECTIVES = {
    "all_to_all_single": lambda world: (world - 1) / world,
    "reduce_scatter": lambda world: (world - 1) / world,
    "reduce_scatter_tensor": lambda world: (world - 1) / world,
    "all_gather": lambda world: world - 1,
    "all_gather_into_tensor": lambda world: world - 1,
}
"""Name -> share of its input that a rank sends to others, as often as it sends it."""
TOLERANCE = {"fp32": 1e-6, "fp16": 2e-3, "bf16": 2e-2, "int8": 2e-2}


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        tables = [EmbeddingBagConfig(name=n, num_embeddings=ROWS, embedding_dim=DIM, feature_names=[n]) for n in "abc"]
        self.bags = EmbeddingBagCollection(tables, device=torch.device("meta"))
        frozen = [FrozenTable(name=name, rows=ROWS, dim=DIM, features=(name,)) for name in ("frozen", "whole")]
        self.frozen = FrozenEmbeddingBagCollection(frozen, device="meta")

    def forward(self, features):
        return torch.cat([self.bags(features).values(), self.frozen(features).values()], 1)


def rows(table):
    return torch.randn(ROWS, DIM, generator=torch.Generator().manual_seed(len(table) + ord(table[0])))


def sharded(config):
    dmp = shard(Model(), CPU, batch_size=BATCH, learning_rate=0.1, sharding_types=KINDS, communication=config)
    for name, weight in dmp.state_dict().items():
        if hasattr(weight, "local_shards"):
            for part in weight.local_shards():
                (r, c), (height, width) = part.metadata.shard_offsets, part.metadata.shard_sizes
                part.tensor.copy_(rows(name.split(".")[-2])[r : r + height, c : c + width])
    for table in ("frozen", "whole"):
        dmp.module.frozen.load(table, rows(table))
    return dmp


def step(forward, backward):
    """(vectors, expected ones, weights after a step by name) and the bytes that this rank sent to others."""
    rank, world = dist.get_rank(), dist.get_world_size()
    config = CommunicationConfig(forward=forward, backward=backward)
    dmp = sharded(config)
    names = list(KINDS)
    ids = torch.randint(ROWS, (len(names) * BATCH,), generator=torch.Generator().manual_seed(rank))
    features = KeyedJaggedTensor(names, ids, lengths=torch.ones_like(ids))
    sent = {"bytes": 0.0}
    originals = {name: getattr(dist, name) for name in COLLECTIVES}

    def counting(name):
        def call(output, input, *args, **kwargs):
            given = input if isinstance(input, list) else [input]
            if given[0].dtype in (torch.float32, torch.float16, torch.bfloat16, torch.uint8):
                sent["bytes"] += COLLECTIVES[name](world) * sum(part.nbytes for part in given)
            return originals[name](output, input, *args, **kwargs)

        def by_names(*args, output=None, input=None, input_list=None, tensor_list=None, tensor=None, **kwargs):
            rest = [part for part in (output, tensor_list, input, input_list, tensor) if part is not None]
            return call(*args, *rest, **kwargs)

        return by_names

    for name in COLLECTIVES:
        setattr(dist, name, counting(name))
    try:
        found = dmp(features)
        wanted = torch.cat([rows(name)[part] for name, part in zip(names, ids.split(BATCH), strict=True)], 1)
        (found * torch.linspace(0.1, 1, found.shape[1])).sum().backward()
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)
    after = {}
    for name, weight in dmp.state_dict().items():
        if hasattr(weight, "local_shards"):
            after |= {(name, *s.metadata.shard_offsets): s.tensor.clone() for s in weight.local_shards()}
    model = Model()
    layout = plan(model, CPU, batch_size=BATCH, sharding_types=KINDS)
    said = communication.bytes_per_vector(model, layout, config, world) * BATCH
    return found.detach(), wanted, after, sent["bytes"], said


def results(pairs):
    return [step(*pair) for pair in pairs]


def test_vectors_gradients_and_bytes_of_each_precision():
    pairs = [("fp32", "fp32"), ("fp16", "fp16"), ("bf16", "bf16"), ("int8", "fp32"), ("int8", "fp16")]
    ranks = run_on_ranks(results, 2, pairs)
    sent = [sum(of_rank[k][3] for of_rank in ranks) / 2 for k in range(len(pairs))]
    for of_rank in ranks:
        exact = of_rank[0][2]
        for (forward, backward), (found, wanted, after, _, _) in zip(pairs, of_rank, strict=True):
            torch.testing.assert_close(found, wanted, atol=3 * TOLERANCE[forward], rtol=TOLERANCE[forward])
            assert torch.equal(found, wanted) == (forward == "fp32")
            for name, weight in after.items():  # row-wise Adagrad: the first step has the same length for any scale
                torch.testing.assert_close(weight, exact[name], atol=0.1 * TOLERANCE[backward], rtol=0.01)
    for (forward, backward), mine, (*_, said) in zip(pairs, sent, ranks[0], strict=True):
        if forward == "int8":  # padded: tables here are narrower than 32 numbers
            assert said < mine < sent[0]
        else:
            assert mine == pytest.approx(said, rel=0.01)
            assert mine == pytest.approx(sent[0] / (1 if backward == "fp32" else 2), rel=0.01)


@pytest.mark.parametrize("pads", ["TorchRec", "the codec"])
def test_int8_pads_vectors_of_any_width(pads):
    codec = communication.Int8Codec(SparseType.INT8, is_fwd=True)
    vectors, context = torch.randn(3, 44), codec.create_context()
    assert codec.padded_size(vectors, [44, 32], 0, context) == (64, 20)
    assert context.padded_dim_sum_per_rank == [64, 32]
    given = nn.functional.pad(vectors, (0, 20)) if pads == "TorchRec" else vectors
    sent = codec.encode(given, context)
    assert sent.numel() == codec.calc_quantized_size(3 * 64, context)
    found = codec.decode(sent, context).view(3, 64)
    torch.testing.assert_close(found[:, :44], vectors, atol=0.02, rtol=0)
    assert not found[:, 44:].abs().max() > 0.02


def broken(precision):
    """What a backend without a precision answers."""
    original = dist.all_to_all_single

    def refuse(output, given, *args, **kwargs):
        if given.dtype == torch.bfloat16:
            raise RuntimeError("Invalid scalar type\nat line 3")
        return original(output, given, *args, **kwargs)

    dist.all_to_all_single = refuse
    try:
        with pytest.raises(InputError) as found:
            sharded(CommunicationConfig(forward="fp16", backward=precision))
        return str(found.value)
    finally:
        dist.all_to_all_single = original


def test_a_precision_that_the_backend_lacks_is_named():
    first, second = run_on_ranks(broken, 2, "bf16")
    assert first == second
    assert first == (
        "communication.backward is bf16, which gloo on the device cpu cannot do (Invalid scalar type at line 3); "
        "expected fp16 or fp32"
    )
