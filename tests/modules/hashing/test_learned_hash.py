"""The module that replaces ids by rows: right rows, in any batch, sharded, pipelined, exported and quantized."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor
from torchrec.inference.modules import quantize_inference_model

from recpress.modules.hashing.id_map import IdMap
from recpress.modules.hashing.learned_hash import LearnedHash
from recpress.modules.id_check import check_ids
from tests.fake_cuda import CUDA, cuda_ids, fake_cuda, without_waiting
from tests.modules.hashing.keyed_cases import batch, id_map
from tests.ranks import run_on_ranks


def by_hand(maps: dict[str, IdMap], features: KeyedJaggedTensor) -> dict[str, list[list[tuple[int, float]]]]:
    """Feature -> for each row of the batch the (row, weight) entries, id by id."""
    found: dict[str, list[list[tuple[int, float]]]] = {}
    for key, jagged in features.to_dict().items():
        bags = zip(
            jagged.to_dense(),
            jagged.to_dense_weights() if features.weights_or_none() is not None else [None] * len(jagged.lengths()),
            strict=True,
        )
        found[key] = []
        for ids, given_weights in bags:
            entries = []
            for place, one in enumerate(ids.tolist()):
                given_weight = 1.0 if given_weights is None else float(given_weights[place])
                if key not in maps:
                    entries.append((one, given_weight))
                    continue
                table = maps[key]
                known = 0 <= one < table.num_ids
                rows = table.rows[one] if known else table.hashed(torch.tensor([one]))[0]
                own = table.weights[one] if known and table.weights is not None else torch.ones(table.rows_per_id)
                entries += [(int(r), given_weight * float(w)) for r, w in zip(rows, own, strict=True)]
            found[key].append(entries)
    return found


def check(maps: dict[str, IdMap], features: KeyedJaggedTensor, result: KeyedJaggedTensor) -> None:
    weighted = features.weights_or_none() is not None or any(m.weights is not None for m in maps.values())
    assert result.keys() == features.keys()
    assert result.stride() == features.stride()
    assert result.values().dtype == features.values().dtype
    assert (result.weights_or_none() is not None) == weighted
    for key, want in by_hand(maps, features).items():
        jagged = result[key]
        rows = [row.tolist() for row in jagged.to_dense()]
        assert rows == [[r for r, _ in bag] for bag in want], key
        if weighted:
            for bag, weights in zip(want, jagged.to_dense_weights(), strict=True):
                torch.testing.assert_close(weights, torch.tensor([w for _, w in bag]))


@st.composite
def cases(draw: Any) -> tuple[dict[str, IdMap], KeyedJaggedTensor]:
    keys = draw(st.permutations(["a", "b", "c", "d"]))
    pool = [
        id_map(draw(st.integers(1, 40)), draw(st.integers(1, 300)), draw(st.integers(1, 2)), draw(st.booleans()), seed)
        for seed in range(2)
    ]
    maps = {key: pool[draw(st.integers(0, 1))] for key in keys[: draw(st.integers(1, 4))]}
    order = draw(st.permutations(keys))
    rows = draw(st.integers(1, 3))
    bag = st.lists(st.integers(-3, 45) | st.integers(-(2**62), 2**62), max_size=4)
    bags = {key: draw(st.lists(bag, min_size=rows, max_size=rows)) for key in order}
    count = sum(len(row) for rows_ in bags.values() for row in rows_)
    weights = draw(st.none() | st.lists(st.floats(-2, 2, width=32), min_size=count, max_size=count))
    return maps, batch(bags, weights)


@settings(deadline=None, max_examples=150)
@given(case=cases(), packed=st.booleans())
def test_rows_are_those_of_the_map(case: tuple[dict[str, IdMap], KeyedJaggedTensor], packed: bool) -> None:
    maps, features = case
    check(maps, features, LearnedHash(maps, packed=packed)(features))


def test_features_may_have_another_stride_each() -> None:
    maps = {"a": id_map(10, 4, rows_per_id=2), "b": id_map(20, 7)}
    features = KeyedJaggedTensor(
        keys=["a", "b"],
        values=torch.tensor([1, 2, 3, 4, 5, 6]),
        lengths=torch.tensor([2, 1, 1, 2]),  # three rows of a, one of b
        stride_per_key_per_rank=[[3], [1]],
        inverse_indices=(["a", "b"], torch.tensor([[0, 1, 2], [0, 0, 0]])),
    )
    found = LearnedHash(maps)(features)
    assert found.stride_per_key() == [3, 1]
    assert found.lengths().tolist() == [4, 2, 2, 2]
    assert found["a"].values().tolist() == maps["a"].rows[1:5].flatten().tolist()
    assert found["b"].values().tolist() == maps["b"].rows[5:7].flatten().tolist()
    assert found.inverse_indices() is features.inverse_indices()


def test_an_empty_batch_and_ids_of_32_bits() -> None:
    maps = {"a": id_map(10, 4), "b": id_map(20, 7, rows_per_id=2)}
    hashes = LearnedHash(maps)
    empty = KeyedJaggedTensor(keys=["a", "b"], values=torch.zeros(0, dtype=torch.int64), lengths=torch.zeros(4).int())
    assert hashes(empty).values().tolist() == []
    features = batch({"a": [[1]], "b": [[19, -1]]})
    narrow = KeyedJaggedTensor(keys=["a", "b"], values=features.values().int(), lengths=features.lengths())
    check(maps, narrow, hashes(narrow))


def test_unknown_ids_are_counted_or_refused() -> None:
    maps = {"a": id_map(10, 4, rows_per_id=2), "b": id_map(20, 7)}
    features = batch({"b": [[20, 3], [-1]], "x": [[-5], [99]], "a": [[9], [10]]})
    hashes = LearnedHash(maps)
    for _ in range(2):
        hashes(features)
    assert hashes.unknown_counts() == {"a": 2, "b": 4}
    hashes.reset_unknown_counts()
    hashes(batch({"b": [[19]], "a": [[0]]}))
    assert hashes.unknown_counts() == {"a": 0, "b": 0}
    strict = LearnedHash(maps, unknown="error")
    strict(batch({"b": [[19]], "a": [[0]]}))
    with pytest.raises(ValueError, match=r"feature 'a' has the id 10, expected 0 to 9"):
        strict(batch({"b": [[0]], "a": [[9, 10]]}))
    with pytest.raises(ValueError, match=r"feature 'b' has the id -1, expected 0 to 19"):
        strict(batch({"b": [[0, -1]], "a": [[9, 10]]}))


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="at least one"):
        LearnedHash({})
    with pytest.raises(ValueError, match="'ignore', expected 'hash' or 'error'"):
        LearnedHash({"a": id_map(3, 2)}, unknown="ignore")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no feature 'a'"):
        LearnedHash({"a": id_map(3, 2)})(batch({"b": [[1]]}))


def test_the_maps_are_shared_packed_and_not_saved() -> None:
    one, other = id_map(1000, 300), id_map(500, 2, rows_per_id=2, weighted=True)
    plain = LearnedHash({"a": one, "b": other, "c": one})
    packed = LearnedHash({"a": one, "b": other, "c": one}, packed=True)
    assert plain.nbytes() == 4 * 1000 + 4 * 1000 + 4 * 1000  # rows of both, weights of one
    assert packed.nbytes() - one.nbytes - other.nbytes in range(9)  # a word at the end, and a part of one
    assert set(plain.state_dict()) == set(packed.state_dict()) == {f"fingerprint.{key}" for key in "abc"}
    assert not list(plain.parameters())


class Exported(nn.Module):
    """Tensors in and out, as a served program has them."""

    def __init__(self, maps: dict[str, IdMap], packed: bool) -> None:
        super().__init__()
        self.hashes = LearnedHash(maps, packed=packed)

    def forward(self, values: torch.Tensor, lengths: torch.Tensor) -> tuple[torch.Tensor, ...]:
        found = self.hashes(KeyedJaggedTensor(["b", "x", "a"], values, lengths=lengths))
        weights = found.weights_or_none()
        return found.values(), found.lengths(), found.values() if weights is None else weights


@pytest.mark.parametrize(("rows_per_id", "packed"), [(1, False), (2, True)])
def test_exported(rows_per_id: int, packed: bool) -> None:
    maps = {"a": id_map(10, 4), "b": id_map(20, 7, rows_per_id, rows_per_id == 2)}
    model = Exported(maps, packed)
    seen = batch({"b": [[1, 2], [3]], "x": [[500], [7]], "a": [[9, 50], [0]]})
    dynamic = {0: torch.export.Dim.DYNAMIC}
    program = torch.export.export(
        model, (seen.values(), seen.lengths()), dynamic_shapes=(dynamic, dynamic), strict=False
    ).module()
    other = batch({"b": [[1, 2], [3], [-4, 5, 6]], "x": [[500], [-7], []], "a": [[9], [10], []]})
    for one, two in zip(*(m(other.values(), other.lengths()) for m in (program, model)), strict=True):
        assert torch.equal(one, two)


MAPS = {"a": (30, 12, 2, True), "b": (40, 16, 1, False)}


DIM = 8


class Model(nn.Module):
    """A hash, tables and a layer: what a pipeline takes."""

    def __init__(self, device: str = "cpu") -> None:
        super().__init__()
        self.hashes = LearnedHash({key: id_map(*shape) for key, shape in MAPS.items()})
        sizes = {"a": MAPS["a"][1], "b": MAPS["b"][1], "x": 9}
        configs = [
            EmbeddingBagConfig(name=f"t_{k}", num_embeddings=n, embedding_dim=DIM, feature_names=[k])
            for k, n in sizes.items()
        ]
        self.tables = EmbeddingBagCollection(configs, is_weighted=True, device=torch.device(device))
        self.top = nn.Linear(3 * DIM, 1)

    def forward(self, features: KeyedJaggedTensor) -> tuple[torch.Tensor, torch.Tensor]:
        pooled = self.tables(self.hashes(features))
        out = self.top(torch.cat([pooled[key] for key in ("a", "b", "x")], 1))  # a sharded collection reorders keys
        return (out**2).mean(), out.detach()


def fill(model: nn.Module) -> None:
    """The same weights however the tables are laid out."""
    full = {}
    torch.manual_seed(1)
    for key, rows in (("a", MAPS["a"][1]), ("b", MAPS["b"][1]), ("x", 9)):
        full[f"tables.embedding_bags.t_{key}.weight"] = torch.randn(rows, DIM)
    full |= {"top.weight": torch.randn(1, 3 * DIM), "top.bias": torch.randn(1)}
    model.load_state_dict(full, strict=False)


def made(step: int, rank: int) -> KeyedJaggedTensor:
    rng = np.random.default_rng([step, rank])
    sizes = {"x": 9, "b": MAPS["b"][0] + 5, "a": MAPS["a"][0] + 5}
    bags = {k: [rng.integers(0, n, rng.integers(0, 4)).tolist() for _ in range(4)] for k, n in sizes.items()}
    count = sum(len(row) for rows in bags.values() for row in rows)
    return batch(bags, rng.random(count).astype(np.float32).tolist())


def sharded_and_pipelined() -> None:
    for layout in ("row_wise", "table_wise", "column_wise"):
        one_layout(layout)


def one_layout(layout: str) -> None:
    import torch.distributed as dist
    from torchrec.distributed.train_pipeline import TrainPipelineSparseDist

    from recpress.trainer.model.sharding import shard

    rank, device = dist.get_rank(), torch.device("cpu")
    layouts = {f"t_{key}": layout for key in ("a", "b", "x")}
    results = []
    for pipelined in (False, True):
        model = shard(Model("meta"), device, batch_size=4, sharding_types=layouts, learning_rate=0.1)
        fill(model)
        plain = Model()
        fill(plain)
        _, want = plain(made(0, rank))
        with torch.no_grad():
            torch.testing.assert_close(model(made(0, rank))[1], want)  # sharded like unsharded
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        outs = []
        if pipelined:
            pipeline = TrainPipelineSparseDist(model, optimizer, device, pipeline_postproc=True)
            batches = iter([made(step, rank) for step in range(4)])
            outs = [pipeline.progress(batches) for _ in range(4)]
            assert len(pipeline._pipelined_modules) == 1
            assert [type(p.postproc_module) for p in pipeline._pipelined_postprocs] == [LearnedHash]
        else:
            for step in range(4):
                optimizer.zero_grad()
                loss, out = model(made(step, rank))
                loss.backward()
                optimizer.step()
                outs.append(out)
        results.append(torch.stack(outs))
        hashes = next(m for m in model.modules() if isinstance(m, LearnedHash))
        assert all(count > 0 for count in hashes.unknown_counts().values())
    assert not torch.equal(results[0][0], results[0][-1])
    torch.testing.assert_close(results[0], results[1])


def test_sharded_and_pipelined() -> None:
    run_on_ranks(sharded_and_pipelined, 2)


def test_quantized() -> None:
    model = Model()
    fill(model)
    features = made(0, 0)
    _, want = model(features)
    quantized = quantize_inference_model(copy.deepcopy(model))
    assert "quant" in type(quantized.tables).__module__
    _, found = quantized(features)
    torch.testing.assert_close(found, want, atol=0.05, rtol=0.05)
    assert not torch.equal(found, want)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("others", [{}, {"b": 32}])
def test_a_map_without_ids_hashes_all(packed: bool, others: dict[str, int]) -> None:
    empty = IdMap(rows=torch.zeros(0, 1, dtype=torch.int32), num_rows=3)
    maps = {key: id_map(ids, 2) for key, ids in others.items()} | {"a": empty}
    found = LearnedHash(maps, packed=packed)(batch({"a": [[4, 2, 9]], "b": [[1]]}))
    assert found["a"].values().tolist() == empty.hashed(torch.tensor([4, 2, 9])).flatten().tolist()


def test_ids_of_other_types_are_refused() -> None:
    given = batch({"a": [[1, 2]]})
    floats = KeyedJaggedTensor(given.keys(), given.values().float(), lengths=given.lengths())
    with pytest.raises(ValueError, match=r"torch.float32, expected torch.int64"):
        LearnedHash({"a": id_map(5, 2)})(floats)


def test_the_maps_are_no_buffers_but_move_with_the_module() -> None:
    """DistributedDataParallel broadcasts buffers in every forward; `to_empty` and `half` would destroy the maps."""
    hashes = LearnedHash({"f": IdMap(rows=torch.tensor([[1], [0]], dtype=torch.int32), num_rows=2)})
    assert not list(hashes.buffers())
    hashes.half().to_empty(device="cpu")
    assert hashes.rows.tolist() == [1, 0]
    hashes.to("meta")
    assert hashes.rows.tolist() == [1, 0]
    assert copy.deepcopy(hashes).rows.tolist() == [1, 0]


@settings(deadline=None, max_examples=150)
@given(case=cases(), packed=st.booleans(), narrow=st.booleans())
def test_the_way_of_a_device_gives_the_same(
    case: tuple[dict[str, IdMap], KeyedJaggedTensor], packed: bool, narrow: bool
) -> None:
    maps, features = case
    if narrow:
        small = features.values().clamp(-(2**30), 2**30).int()
        features = KeyedJaggedTensor(features.keys(), small, features.weights_or_none(), lengths=features.lengths())
    host, device = LearnedHash(maps, packed=packed), LearnedHash(maps, packed=packed)
    want = host(features)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("recpress.modules.hashing.learned_hash.host_reads", lambda ids: False)
        found = device(features)
    check(maps, features, found)
    assert torch.equal(found.values(), want.values())
    assert found.values().dtype == want.values().dtype
    assert device.unknown_counts() == host.unknown_counts()


def test_on_a_device_unknown_ids_are_found_later(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("recpress.modules.hashing.learned_hash.host_reads", lambda ids: False)
    maps = {"a": id_map(10, 4, rows_per_id=2), "b": id_map(20, 7)}
    model = nn.ModuleDict({"hashes": LearnedHash(maps, unknown="error")})
    strict: Any = model["hashes"]
    strict(batch({"b": [[19]], "x": [[77]], "a": [[0]]}))
    check_ids(model)
    bad = batch({"b": [[0, 3], [], [-1]], "x": [[-8], [8], []], "a": [[9, 10], [50], []]})
    check(maps, bad, strict(bad))
    strict(batch({"b": [[99]], "a": [[-7]]}))
    with pytest.raises(ValueError, match=r"feature 'b' has the id -1, expected 0 to 19"):
        check_ids(model)
    assert strict.unknown_counts() == {"a": 3, "b": 2}
    strict.reset_unknown_counts()
    strict(batch({"b": [[0]], "a": [[9, 10]]}))
    with pytest.raises(ValueError, match=r"feature 'a' has the id 10, expected 0 to 9"):
        check_ids(model)
    lenient = LearnedHash(maps)
    lenient(bad)
    check_ids(lenient)
    assert lenient.unknown_counts() == {"a": 2, "b": 1}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("rows_per_id", [1, 2])
@pytest.mark.parametrize("unknown", ["hash", "error"])
def test_on_cuda_no_step_waits(packed: bool, weighted: bool, rows_per_id: int, unknown: Any) -> None:
    maps = {"a": id_map(10, 4, rows_per_id, weighted), "b": id_map(20, 7)}
    hashes = LearnedHash(maps, packed=packed, unknown=unknown)
    with fake_cuda():
        hashes.to(CUDA)
        for lengths in ([4, 2, 3], [5, 0, 5]):
            features = KeyedJaggedTensor(
                ["b", "x", "a"], cuda_ids(sum(lengths)), lengths=cuda_ids(9), length_per_key=lengths, stride=3
            )
            found = without_waiting(lambda features=features: hashes(features))
            assert found.values().device == CUDA
            assert len(found.values()) == lengths[0] + lengths[1] + rows_per_id * lengths[2]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("rows_per_id", [1, 2])
def test_rows_on_a_device(device: torch.device, packed: bool, rows_per_id: int) -> None:
    maps = {"a": id_map(10, 4, rows_per_id, rows_per_id == 2), "b": id_map(20, 7, seed=1)}
    features = batch({"b": [[1, 20], [3]], "x": [[500], [-7]], "a": [[9, 50], [0, -1, 2]]})
    hashes = LearnedHash(maps, packed=packed).to(device)
    found = hashes(features.to(device))
    assert found.values().device.type == device.type
    check(maps, features, found.to(torch.device("cpu")))
    assert hashes.unknown_counts() == {"a": 2, "b": 1}
