import contextlib
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import nn
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor
from torchrec.distributed.train_pipeline import TrainPipelineBase

from recpress.data.config import Schema, StreamConfig
from recpress.data.dataset.log import open_log
from recpress.data.dataset.side_table import JaggedColumn, SideTable
from recpress.data.errors import InputError
from recpress.data.negatives.samplers import InBatchNegatives, InteractionSet, PopularityNegatives, UniformNegatives
from recpress.data.stream.batch import Batch, BatchBuilder
from recpress.data.stream.loader import Interactions, InteractionStream
from tests.fake_cuda import CUDA, cuda_ids, fake_cuda, without_waiting

USERS, ITEMS = 30, 12
SCHEMA = Schema(label="rating", categorical=("device", "queries"), floats=("hour",))


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    folder = tmp_path_factory.mktemp("log")
    user = np.arange(90) % USERS
    hours = [float(u) if u % 7 else None for u in range(90)]
    table = pa.table(
        {
            "user_id": user,
            "item_id": np.arange(90) * 5 % ITEMS,
            "rating": user / 10,
            "device": user % 3,
            "queries": pa.array([[int(u)] * (u % 3) for u in user], pa.list_(pa.int64())),
            "hour": pa.array(hours, pa.float32()),
        }
    )
    pq.write_table(table, folder / "train.parquet", row_group_size=20)
    return open_log(folder, SCHEMA)


@pytest.fixture(scope="module")
def tables():
    users = pa.table({"age": np.arange(USERS) % 5})
    items = pa.table(
        {
            "genres": pa.array([list(range(k % 4)) for k in range(ITEMS)], pa.list_(pa.int64())),
            "price": np.arange(ITEMS, dtype=np.float32),
        }
    )
    return SideTable.from_arrow(users), SideTable.from_arrow(items)


def rows_of(log, columns=None, batch_size=8):
    return InteractionStream(log.train, log.schema, StreamConfig(batch_size=batch_size), columns=columns)


def lists_of(features: KeyedJaggedTensor, key: str) -> list[list[int]]:
    part = features[key]
    return [values.tolist() for values in part.values().split(part.lengths().tolist())]


def test_ids_alone(log):
    counts = log.counts("item")
    negatives = PopularityNegatives(counts, 3, seed=2)
    build = BatchBuilder(negatives, item_counts=counts)
    for rows in rows_of(log, ["user_id", "item_id"]):
        batch, size = build(rows), rows.size
        assert batch.user_features.keys() == ["user"]
        assert batch.item_features.keys() == ["item"]
        assert batch.user_features.stride() == size
        assert batch.item_features.stride() == 4 * size
        assert torch.equal(batch.user_features["user"].values(), rows.user)
        items = batch.item_features["item"].values()
        assert torch.equal(items[:size], rows.item)
        drawn = PopularityNegatives(counts, 3, seed=2).draw(rows.user, rows.epoch, rows.position)
        assert torch.equal(items[size:].view(size, 3), drawn)
        assert torch.equal(batch.label, torch.ones(size))
        share = torch.tensor(counts / counts.sum()).float().log()
        torch.testing.assert_close(batch.log_q[:size], share[rows.item])
        torch.testing.assert_close(batch.log_q[size:], negatives.log_q(drawn).flatten())
        assert batch.user_floats is None
        assert batch.item_floats is None


def test_features_of_rows_users_and_items(log, tables):
    users, items = tables
    build = BatchBuilder(UniformNegatives(ITEMS, 2), user_table=users, item_table=items)
    for rows in rows_of(log):
        batch = build(rows)
        assert batch.user_features.keys() == ["user", "age", "device", "queries"]
        u = rows.user.tolist()
        assert lists_of(batch.user_features, "age") == [[k % 5] for k in u]
        assert lists_of(batch.user_features, "device") == [[k % 3] for k in u]
        assert lists_of(batch.user_features, "queries") == [[k] * (k % 3) for k in u]
        assert torch.equal(batch.label, rows.user.float() / 10)
        assert batch.user_floats.shape == (rows.size, 1)
        assert torch.isfinite(batch.user_floats).all()
        assert batch.item_features.keys() == ["item", "genres"]
        ids = batch.item_features["item"].values().tolist()
        assert lists_of(batch.item_features, "genres") == [list(range(k % 4)) for k in ids]
        torch.testing.assert_close(batch.item_floats, items.floats[ids])
        assert batch.item_floats.shape == (3 * rows.size, 1)


def test_offsets_agree_with_torchrecs_own(log, tables):
    build = BatchBuilder(UniformNegatives(ITEMS, 2), user_table=tables[0], item_table=tables[1])
    batch = build(next(iter(rows_of(log))))
    for features in (batch.user_features, batch.item_features):
        keys, stride = features.keys(), features.stride()
        plain = KeyedJaggedTensor.from_lengths_sync(keys, features.values(), features.lengths())
        assert torch.equal(plain.offsets(), features.offsets())
        assert plain.length_per_key() == features.length_per_key()
        assert plain.offset_per_key() == features.offset_per_key()
        assert plain.stride() == stride


def test_in_batch_has_positives_alone(log):
    batch = BatchBuilder(InBatchNegatives(log.counts("item")))(next(iter(rows_of(log))))
    assert batch.item_features.stride() == batch.user_features.stride() == len(batch.log_q)


def test_rejection_reaches_the_batch(log):
    pairs = InteractionSet.of([log.train], "user_id", "item_id", ITEMS)
    build = BatchBuilder(UniformNegatives(ITEMS, 4, reject=pairs))
    for rows in rows_of(log):
        items = build(rows).item_features["item"].values()[rows.size :].view(rows.size, 4)
        assert not pairs.contains(rows.user.unsqueeze(1), items).any()


def test_features_for_evaluation(log, tables):
    build = BatchBuilder(UniformNegatives(ITEMS, 2), user_table=tables[0], item_table=tables[1])
    features, floats = build.items(torch.arange(ITEMS))
    assert features.keys() == ["item", "genres"]
    assert torch.equal(floats, tables[1].floats)
    features, floats = build.users(torch.tensor([7, 3]))
    assert lists_of(features, "age") == [[2], [3]]
    assert floats is None


@pytest.mark.parametrize("key", ["user", "device"])
def test_names_that_clash_are_refused(log, key):
    table = SideTable.from_arrow(pa.table({key: np.zeros(USERS, np.int64)}))
    build = BatchBuilder(UniformNegatives(ITEMS, 1), user_table=table)
    with pytest.raises(InputError, match=f"'{key}'"):
        build(next(iter(rows_of(log))))


class Model(nn.Module):
    """A small two-tower network, as the trainer's pipeline takes it."""

    def __init__(self) -> None:
        super().__init__()
        make = lambda name, rows, keys: EmbeddingBagConfig(  # noqa: E731
            name=name, num_embeddings=rows, embedding_dim=4, feature_names=keys
        )
        users = [make("t_user", USERS, ["user"]), make("t_age", 5, ["age"])]
        items = [make("t_item", ITEMS, ["item"]), make("t_genres", 4, ["genres"])]
        self.users = EmbeddingBagCollection(tables=users, device=torch.device("cpu"))
        self.items = EmbeddingBagCollection(tables=items, device=torch.device("cpu"))

    def forward(self, batch: Batch):
        u, v = self.users(batch.user_features).values(), self.items(batch.item_features).values()
        size = len(batch.label)
        scores = torch.cat(
            [(u * v[:size]).sum(1, keepdim=True), torch.einsum("bd,bnd->bn", u, v[size:].view(size, -1, 8))],
            1,
        )
        loss = nn.functional.cross_entropy(scores, torch.zeros(size, dtype=torch.int64, device=scores.device))
        return loss, loss.detach()


def test_a_pipeline_trains_on_it(log, tables, device):
    torch.manual_seed(0)
    model = Model().to(device)
    pipeline = TrainPipelineBase(model, torch.optim.Adam(model.parameters(), 0.05), torch.device(device))
    pairs = InteractionSet.of([log.train], "user_id", "item_id", ITEMS)
    negatives = UniformNegatives(ITEMS, 2, reject=pairs)
    build = BatchBuilder(negatives, user_table=tables[0], item_table=tables[1])
    stream, losses = rows_of(log), []

    def batches():
        for epoch in range(30):
            stream.set_epoch(epoch)
            yield from map(build, stream)

    iterator = batches()
    with contextlib.suppress(StopIteration):
        while True:
            losses.append(float(pipeline.progress(iterator)))
    assert len(losses) == 30 * 12
    assert np.mean(losses[-12:]) < 0.3 * np.mean(losses[:12])


def test_built_on_the_device_or_moved_there(log, tables, device):
    kwargs = {"user_table": tables[0], "item_table": tables[1], "item_counts": log.counts("item")}
    rows = next(iter(rows_of(log)))
    moved = BatchBuilder(UniformNegatives(ITEMS, 2), **kwargs)(rows)
    if device.type == "cuda":
        moved = moved.pin_memory().to(device, non_blocking=True)
        moved.record_stream(torch.cuda.current_stream())
    built = BatchBuilder(UniformNegatives(ITEMS, 2), device=device, **kwargs)(rows)
    assert moved.label.device.type == built.label.device.type == device.type
    assert torch.equal(moved.user_features.values(), built.user_features.values())
    assert torch.equal(moved.item_features.lengths(), built.item_features.lengths())
    assert torch.equal(moved.item_floats, built.item_floats)
    torch.testing.assert_close(moved.log_q, built.log_q)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("popular", [False, True])
def test_on_cuda_no_batch_waits(log, popular, shared):
    pairs = InteractionSet.of([log.train], "user_id", "item_id", ITEMS)
    counts = log.counts("item")
    negatives = PopularityNegatives(counts, 2, reject=pairs) if popular else UniformNegatives(ITEMS, 2, reject=pairs)
    with fake_cuda():
        rows = Interactions(
            user=torch.empty(8, dtype=torch.int64),
            item=torch.empty(8, dtype=torch.int64),
            label=torch.empty(8),
            time=None,
            categorical={
                "device": torch.empty(8, dtype=torch.int64),
                "queries": JaggedColumn(torch.empty(11, dtype=torch.int64), torch.empty(8, dtype=torch.int64)),
            },
            floats=torch.empty(8, 1),
            epoch=0,
            step=1,
            position=8,
            size=8,
        )
        users = SideTable(USERS, {"age": cuda_ids(USERS)}, [], None)
        items = SideTable(ITEMS, {}, ["price"], torch.empty(ITEMS, 1, device=CUDA))
        build = BatchBuilder(negatives, shared=shared, user_table=users, item_table=items, device=CUDA)
        assert build.for_training() is build
        batch = without_waiting(lambda: build(rows))
        assert batch.user_features.keys() == ["user", "age", "device", "queries"]
        assert batch.item_features.device() == batch.log_q.device == CUDA
        assert batch.item_floats.shape == (10 if shared else 24, 1)


def test_the_item_of_a_row_does_not_count_in_the_items_of_its_user():
    values = torch.tensor([3, 1, 3, 1, 2, 0], dtype=torch.int32)  # of the lists 3 1 3, none, 1, and 2 0
    table = SideTable(4, {"history": (values, torch.tensor([0, 3, 3, 4, 6]))}, [], None)
    build = BatchBuilder(UniformNegatives(ITEMS, 2), user_table=table, history="history")
    users, items = torch.tensor([0, 0, 1, 2, 3]), torch.tensor([3, 1, 0, 1, 1])
    empty = dict.fromkeys(("label", "time", "floats")) | {"categorical": {}, "epoch": 0, "step": 0, "position": 0}
    batch = build(Interactions(user=users, item=items, size=5, **empty))
    assert lists_of(batch.user_features, "history") == [[1], [3, 3], [], [], [2, 0]]
    assert batch.user_features.values().dtype == torch.int64
    assert lists_of(build.users(torch.tensor([0, 3]))[0], "history") == [[3, 1, 3], [2, 0]]  # not for ranking
    build.replace_users(SideTable(4, {"history": (values[:0], torch.zeros(5, dtype=torch.int64))}, [], None))
    assert lists_of(build.users(torch.tensor([0, 3]))[0], "history") == [[], []]


def test_lists_on_cuda_are_built_on_the_host(log, tables):
    """On the device, the host would wait in each step for the number of their values."""
    with fake_cuda():
        users = SideTable(USERS, {"age": torch.empty(USERS, dtype=torch.int64)}, [], None)
        items = SideTable(ITEMS, {"genres": (torch.empty(9), torch.empty(ITEMS + 1))}, [], None)
        build = BatchBuilder(UniformNegatives(ITEMS, 2), user_table=users, item_table=items, device=CUDA)
        assert build.for_training().device.type == "cpu"
        assert build.for_training() is build.for_training()


def test_the_data_layer_imports_no_torchrec():
    """All but `stream.batch` and `stream.keyed` stay free of it: its import takes seconds."""
    code = (
        "import sys, recpress.data.stream.loader, recpress.data.negatives.samplers, recpress.data.dataset.side_table;"
        "sys.exit('torchrec' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
