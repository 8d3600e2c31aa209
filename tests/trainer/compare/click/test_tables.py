"""Tables of the comparison of click models against TorchRec's collection, and rows of a map by hand."""

import pytest
import torch
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor
from torchrec.modules.embedding_configs import PoolingType

from recpress.modules.hashing.id_map import IdMap
from recpress.trainer.compare.click.tables import SPARSE, MappedTable, Tables

CONFIGS = [
    EmbeddingBagConfig(name="a", num_embeddings=5, embedding_dim=4, feature_names=["one", "list"]),
    EmbeddingBagConfig(name="b", num_embeddings=3, embedding_dim=4, feature_names=["mean"], pooling=PoolingType.MEAN),
]


def test_full_tables_are_those_of_torchrec_with_lists_means_and_shared_tables():
    values, lengths = torch.tensor([4, 0, 1, 2, 3, 1, 0, 1]), torch.tensor([1, 1, 0, 3, 2, 1])
    batch = KeyedJaggedTensor(["one", "list", "mean"], values, lengths=lengths)
    reference = EmbeddingBagCollection(CONFIGS)
    modules = {
        name: MappedTable(len(bag.weight), 4, start=bag.weight.detach())
        for name, bag in reference.embedding_bags.items()
    }
    found = Tables(CONFIGS, modules, {"list", "mean"})(batch)
    expected = reference(batch)
    assert found.keys() == expected.keys()
    assert torch.allclose(found.values(), expected.values())


def test_rows_of_a_map_are_weighted_and_added_or_multiplied():
    rows = torch.tensor([[0, 1], [2, 2]], dtype=torch.int32)
    start = torch.tensor([[1.0, 2], [3, 4], [5, 6]])
    weighted = IdMap(rows=rows, num_rows=3, weights=torch.tensor([[2.0, -1], [0.5, 0]]).half())
    ids = torch.tensor([1, 0])
    assert MappedTable(3, 2, weighted, start=start)(ids).tolist() == [[2.5, 3], [-1, 0]]
    plain = IdMap(rows=rows, num_rows=3)
    assert MappedTable(3, 2, plain, start=start)(ids).tolist() == [[10, 12], [4, 6]]
    assert MappedTable(3, 2, plain, product=True, start=start)(ids).tolist() == [[25, 36], [3, 8]]


@pytest.mark.parametrize("rows", [10, SPARSE])
def test_large_tables_have_sparse_gradients(rows):
    table = MappedTable(rows, 4)
    table(torch.tensor([1, 1])).sum().backward()
    assert table.rows.weight.grad.is_sparse == (rows == SPARSE)
