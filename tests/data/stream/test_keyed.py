import pickle
import threading
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, IterableDataset
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig
from torchrec.distributed import DistributedModelParallel, TrainPipelineSparseDist
from torchrec.models.dlrm import DLRM, DLRMTrain
from torchrec.optim import RowWiseAdagrad
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward

from recpress.data.config import Schema, StreamConfig
from recpress.data.dataset.log import open_log
from recpress.data.errors import InputError
from recpress.data.stream.float_transform import FloatTransform, standardize
from recpress.data.stream.keyed import Keyed, KeyedBatches
from recpress.data.stream.loader import InteractionStream, StreamDataset

ROWS = 500


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    folder = tmp_path_factory.mktemp("log")
    user = np.arange(ROWS)
    price = user.astype(np.float32)
    price[7] = np.nan
    columns = {
        "user_id": user,
        "item_id": user * 7 % 101,
        "label": (user % 2).astype(np.float32),
        "kind": user % 5,
        "tags": pa.array([list(range(u, u + u % 3)) for u in user.tolist()], pa.list_(pa.int64())),
        "price": price,
        "age": -user.astype(np.float64),
    }
    pq.write_table(pa.table(columns), folder / "train.parquet", row_group_size=60)
    return open_log(folder, Schema(label="label", categorical=("kind", "tags"), floats=("price", "age")))


def batches(log, keys=None, prefetch_batches=2, **kwargs):
    config = StreamConfig(batch_size=64, buffer_rows=200, prefetch_batches=prefetch_batches, num_threads=2)
    return KeyedBatches(InteractionStream(log.train, log.schema, config), keys, **kwargs)


@pytest.mark.parametrize("ready", [0, 1, 3])
@pytest.mark.parametrize("keys", [["user_id", "item_id"], ["kind", "user_id"], ["tags", "item_id", "kind"]])
def test_features_are_the_columns(log, keys, ready):
    made = batches(log, keys, ready)
    seen = 0
    for rows, batch in zip(made.stream, made, strict=True):
        size = rows.size
        assert batch.sparse_features.keys() == keys
        assert batch.sparse_features.stride() == size
        columns = {"user_id": rows.user, "item_id": rows.item, **rows.categorical}
        for name in keys:
            found = batch.sparse_features[name]
            if name == "tags":
                assert torch.equal(found.values(), columns[name].values)
                assert torch.equal(found.lengths(), columns[name].lengths)
            else:
                assert torch.equal(found.values(), columns[name])
                assert torch.equal(found.lengths(), torch.ones(size, dtype=torch.int64))
        assert torch.equal(batch.dense_features, rows.floats.nan_to_num(0.0))
        assert torch.equal(batch.labels, rows.label)
        seen += size
    assert seen == ROWS


def test_values_that_lie_together_are_not_copied(log):
    made = batches(log, ["user_id", "item_id", "kind"], prefetch_batches=0)
    rows = next(iter(made.stream))
    values = made.keyed(rows).sparse_features.values()
    assert values.data_ptr() == rows.user.data_ptr()


def test_transforms_run_before_the_batch(log):
    made = batches(log, ["user_id", "tags"], transforms={"user_id": lambda ids: ids // 2, "tags": lambda ids: ids + 1})
    for rows, batch in zip(made.stream, made, strict=True):
        assert torch.equal(batch.sparse_features["user_id"].values(), rows.user // 2)
        assert torch.equal(batch.sparse_features["tags"].values(), rows.categorical["tags"].values + 1)


def test_keys_that_cannot_be(log):
    with pytest.raises(InputError, match="key 'price'"):
        batches(log, ["price"])
    with pytest.raises(InputError, match="transform of column 'kind'"):
        batches(log, ["user_id"], transforms={"kind": torch.neg})
    for shorter in (lambda ids: ids[1:], lambda ids: (ids, torch.ones(1))):
        with pytest.raises(InputError, match="'user_id' made"):
            next(iter(batches(log, ["user_id"], transforms={"user_id": shorter})))
    with pytest.raises(InputError, match="'price' made"):
        next(iter(batches(log, ["user_id"], transforms={"price": lambda values: values[1:]})))
    with pytest.raises(InputError, match="float column 'kind': expected one of price, age"):
        batches(log, ["user_id"], floats=["kind"])
    with pytest.raises(InputError, match="'user_id' is a dict, expected a function"):
        batches(log, ["user_id"], transforms={"user_id": {}})
    with pytest.raises(InputError, match="no key"):
        batches(log, [])


def test_a_transform_may_give_several_rows_and_weights_per_id(log):
    """As maps of two rows per id do. The weights of one map leave other features at 1."""

    def two(ids):
        return torch.stack([ids, ids + 1000], dim=1)

    def weighted(ids):
        return two(ids), torch.full((len(ids), 2), 0.25)

    keys = ["user_id", "tags", "kind"]
    made = batches(log, keys, transforms={"user_id": two, "tags": weighted})
    plain = batches(log, keys, transforms={"user_id": two})
    for rows, batch, other in zip(made.stream, made, plain, strict=True):
        tags, lengths = rows.categorical["tags"].values, rows.categorical["tags"].lengths
        users, found = batch.sparse_features["user_id"], batch.sparse_features["tags"]
        assert torch.equal(users.values(), two(rows.user).flatten())
        assert users.lengths().tolist() == [2] * rows.size
        assert torch.equal(found.values(), two(tags).flatten())
        assert torch.equal(found.lengths(), lengths * 2)
        assert torch.equal(found.weights(), torch.full((2 * len(tags),), 0.25))
        assert batch.sparse_features["kind"].weights().tolist() == [1.0] * rows.size
        assert other.sparse_features.weights_or_none() is None
        assert torch.equal(other.sparse_features["user_id"].values(), users.values())


def test_floats_are_chosen_and_transformed(log):
    values = torch.cat([rows.floats for rows in batches(log).stream])
    price = values[:, 0].log1p()
    mean, std = float(price.nanmean()), float(price[~price.isnan()].std(correction=0))
    transforms = standardize(log.train, ["price"], log1p=["price"], missing=9.0)
    assert (transforms["price"].mean, transforms["price"].std) == pytest.approx((mean, std), rel=1e-6)
    made = batches(log, ["kind"], floats=["age", "price"], transforms=transforms)
    found = torch.cat([batch.dense_features for batch in made])
    assert torch.equal(found[:, 0], values[:, 1])
    torch.testing.assert_close(found[:, 1], ((price - mean) / std).nan_to_num(nan=9.0))
    assert (found[:, 1] == 9.0).sum() == 1
    all_floats = torch.cat([batch.dense_features for batch in batches(log, ["kind"], transforms=transforms)])
    assert torch.equal(all_floats, found[:, [1, 0]])
    assert next(iter(batches(log, ["kind"], floats=[]))).dense_features is None


def test_names_of_the_last_version_warn(log):
    batch = next(iter(batches(log, ["kind"])))
    for old, new in (("features", "sparse_features"), ("dense", "dense_features"), ("label", "labels")):
        with pytest.warns(DeprecationWarning, match=f"KeyedBatch.{old} is KeyedBatch.{new}"):
            assert getattr(batch, old) is getattr(batch, new)


@pytest.fixture
def one_rank():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_torchrecs_own_model_and_pipeline_take_them_unchanged(log, one_rank):
    """DLRMTrain reads `dense_features`, `sparse_features` and `labels`; the pipeline moves, traces and prefetches."""
    keys = ["user_id", "kind", "tags"]
    sizes = {"user_id": 2 * ROWS, "kind": 5, "tags": 2 * ROWS}
    tables = [
        EmbeddingBagConfig(name=f"t_{key}", embedding_dim=8, num_embeddings=sizes[key], feature_names=[key])
        for key in keys
    ]
    torch.manual_seed(0)
    dlrm = DLRM(EmbeddingBagCollection(tables=tables), dense_in_features=2, dense_arch_layer_sizes=[8, 8],
                over_arch_layer_sizes=[8, 1])  # fmt: skip
    apply_optimizer_in_backward(RowWiseAdagrad, dlrm.sparse_arch.parameters(), {"lr": 0.5})
    model = DistributedModelParallel(DLRMTrain(dlrm), device=torch.device("cpu"))
    optimizer = torch.optim.Adagrad(model.parameters(), lr=0.1)
    pipeline = TrainPipelineSparseDist(model, optimizer, torch.device("cpu"))
    transforms = {
        "user_id": lambda ids: torch.stack([ids, ids + ROWS], dim=1),
        **standardize(log.train, ["price", "age"]),
    }
    made = batches(log, keys, transforms=transforms)
    losses = []
    for epoch in range(6):
        made.stream.set_epoch(epoch)
        ahead = iter(made)
        losses += [float(pipeline.progress(ahead)[0]) for _ in range(len(made))]
        with pytest.raises(StopIteration):
            pipeline.progress(ahead)
    assert len(losses) == 6 * len(made)
    assert np.mean(losses[-5:]) < np.mean(losses[:5]) - 0.1


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stateful_data_loader_resumes_in_the_middle_of_an_epoch(log, workers):
    """As torchdata's StatefulDataLoader uses it; the position survives its checkpoint, and nothing is replayed."""
    stateful_dataloader = pytest.importorskip("torchdata.stateful_dataloader")
    made = batches(log, ["user_id"])

    def loader(epoch):
        keyed = batches(log, ["user_id"])
        keyed.stream.set_epoch(epoch)
        return keyed, stateful_dataloader.StatefulDataLoader(keyed, batch_size=None, num_workers=workers)

    made.stream.set_epoch(1)
    want = [batch.sparse_features.values().tolist() for batch in made]
    for stop in range(len(want)):
        _, first = loader(1)
        ahead = iter(first)
        found = [next(ahead).sparse_features.values().tolist() for _ in range(stop)]
        state = pickle.loads(pickle.dumps(first.state_dict()))
        del ahead
        keyed, second = loader(0)
        second.load_state_dict(state)
        found += [batch.sparse_features.values().tolist() for batch in second]
        assert found == want
        keyed.stream.set_epoch(2)
        assert len(list(second)) == len(want)


def test_the_position_of_an_iteration(log):
    """What a StatefulDataLoader stores and restores, in this process and in a worker."""
    for make in (lambda: batches(log, ["user_id"]), lambda: StreamDataset(batches(log).stream)):
        one, other = make(), make()
        one.stream.set_epoch(3)
        assert one.state_dict() == {"epoch": 3, "step": 0}
        ahead = iter(one)
        for _ in range(3):
            next(ahead)
        assert one.state_dict() == {"epoch": 3, "step": 3}
        other.load_state_dict(one.state_dict())
        rest = [batch.step if hasattr(batch, "step") else None for batch in other]
        assert len(rest) == len(one) - 3
        assert other.state_dict() == {"epoch": 3, "step": len(one)}
        assert rest[0] in (None, 3)


def test_the_position_of_a_worker(log, monkeypatch):
    monkeypatch.setattr(torch.utils.data._utils.worker, "_worker_info", SimpleNamespace(id=1, num_workers=3))
    one, other = StreamDataset(batches(log).stream), StreamDataset(batches(log).stream)
    ahead = iter(one)
    assert [next(ahead).step for _ in range(2)] == [1, 4]
    other.load_state_dict(one.state_dict())
    assert [rows.step for rows in other] == [rows.step for rows in ahead]


def same(one, other):
    """Whether two keyed batches are the same."""
    pairs = [(one.dense_features, other.dense_features), (one.labels, other.labels)]
    pairs += [
        (one.sparse_features.values(), other.sparse_features.values()),
        (one.sparse_features.lengths(), other.sparse_features.lengths()),
    ]
    return one.sparse_features.keys() == other.sparse_features.keys() and all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("keys", [["user_id", "item_id"], ["tags", "item_id", "kind"]])
def test_in_a_data_loader_batches_and_order_are_the_same(log, keys):
    made = pickle.loads(pickle.dumps(batches(log, keys)))  # as for workers that are spawned
    for workers in (0, 1, 3):
        loader = DataLoader(made, batch_size=None, num_workers=workers)
        assert len(loader) == len(made)
        for epoch in (0, 1):
            made.stream.set_epoch(epoch)
            found = list(loader)
            assert all(same(one, other) for one, other in zip(found, made, strict=True))


class Own(IterableDataset):
    """A dataset that somebody writes around keyed batches."""

    def __init__(self, made):
        self.made = made

    def __iter__(self):
        yield from self.made


def test_around_keyed_batches_no_row_comes_twice(log):
    made = batches(log, ["user_id"])
    found = list(DataLoader(Own(made), batch_size=None, num_workers=2))
    assert sorted(torch.cat([batch.sparse_features.values() for batch in found]).tolist()) == list(range(ROWS))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("keys", [["user_id", "item_id"], ["tags", "kind"]])
def test_keyed_batches_of_a_data_loader_of_rows(log, keys, workers):
    made = batches(log, keys)
    loader = DataLoader(StreamDataset(made.stream), batch_size=None, num_workers=workers)
    assert all(same(one, other) for one, other in zip(map(Keyed(keys), loader), made, strict=True))


def test_what_cannot_work_in_a_worker_is_named(log, monkeypatch):
    """As seen by a worker; a DataLoader whose worker has raised takes five seconds to end."""
    monkeypatch.setattr(torch.utils.data._utils.worker, "_worker_info", SimpleNamespace(id=0, num_workers=2))
    made = batches(log, ["user_id"])
    assert len(list(made)) == len(made) / 2
    with pytest.raises(InputError, match="persistent_workers=False"):
        list(made)
    made.stream.set_epoch(1)  # by the worker itself
    assert len(list(made)) == len(made) / 2
    with pytest.raises(InputError, match=r"DataLoader\(pin_memory=True\)"):
        list(batches(log, ["user_id"], pin_memory=True))
    stream = InteractionStream(log.train, log.schema, StreamConfig(batch_size=64), pin_memory=True)
    with pytest.raises(InputError, match=r"DataLoader\(pin_memory=True\)"):
        list(StreamDataset(stream))


def test_rows_without_a_key_are_named(log):
    rows = next(iter(batches(log).stream))
    with pytest.raises(InputError, match=r"key 'shop'.*user_id"):
        Keyed(["user_id", "shop"])(rows)
    with pytest.raises(InputError, match=r"key 'shop'.*tags"):
        Keyed(["tags", "shop"])(rows)


@pytest.mark.parametrize("value", [np.inf, -np.inf, 1e300])
def test_infinite_floats_are_refused_by_place(tmp_path, value):
    price = np.full(40, 2.0)
    price[[3, 27]] = np.nan, value
    table = pa.table({"user_id": np.arange(40), "item_id": np.arange(40), "price": price})
    pq.write_table(table, tmp_path / "train.parquet", row_group_size=20)
    log = open_log(tmp_path, Schema(floats=("price",)))
    stream = InteractionStream(log.train, log.schema, StreamConfig(batch_size=8))
    with pytest.raises(InputError, match=r"train.parquet, row group 1, column 'price', row 7: .*finite"):
        list(KeyedBatches(stream))


# ---- the thread


def test_threads_of_stream_and_batches_end_together(log):
    results = iter(batches(log))
    next(results)
    results.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("recpress-stream")]


def test_float_transforms_that_cannot_be(log):
    with pytest.raises(InputError, match=r"std 0\.0"):
        FloatTransform(std=0.0)
    with pytest.raises(InputError, match="no column 'cost'"):
        standardize(log.train, ["cost"])
    with pytest.raises(InputError, match="no column 'age'"):
        standardize(log.train, ["price"], log1p=["age"])
    constant = standardize(log.train, ["price"])["price"]
    assert constant(torch.tensor([float("nan")])).tolist() == [0.0]


@pytest.mark.parametrize("value", [0.1, 3.0, 5.3])
@pytest.mark.parametrize("log1p", [(), ("price",)])
def test_a_constant_column_is_only_shifted(tmp_path, value, log1p):
    table = pa.table({"user_id": [0] * 77, "item_id": [0] * 77, "price": [value] * 77})
    pq.write_table(table, tmp_path / "train.parquet", row_group_size=10)
    found = standardize(open_log(tmp_path, Schema(floats=("price",))).train, ["price"], log1p=log1p)["price"]
    assert found.std == 1.0
    torch.testing.assert_close(found(torch.tensor([value, value])), torch.zeros(2), atol=1e-6, rtol=0)
