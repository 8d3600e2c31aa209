"""`recpress sample`: the written sample is the streamed one, and all else of the log stays."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recpress.data.config import IngestConfig, LayoutConfig, SampleConfig, Schema, StreamConfig, SynthConfig
from recpress.data.dataset.log import open_log
from recpress.data.errors import InputError
from recpress.data.ingest.convert import ingest
from recpress.data.ingest.split import leave_one_out
from recpress.data.sampling.bucket_shuffle import BucketShuffle
from recpress.data.sampling.design_effect import design_effects
from recpress.data.sampling.sample import write_sample
from recpress.data.sampling.scan import iter_columns
from recpress.data.stream.loader import InteractionStream
from recpress.data.synthetic.interactions import synth


@pytest.fixture(autouse=True)
def _cache(monkeypatch, tmp_path):
    monkeypatch.setenv("RECPRESS_CACHE", str(tmp_path / "cache"))


def table(rows: int, first: int = 0) -> pa.Table:
    """Columns of many types; `row` tells each row from all others."""
    row = np.arange(first, first + rows)
    return pa.table(
        {
            "user_id": pa.array(row % 11, pa.int32()),
            "item_id": pa.array(row * 7 % 23, pa.uint16()),
            "time": pa.array(row * 1000, pa.timestamp("ms")),
            "tags": pa.array([[int(r)] * (int(r) % 4) or None for r in row], pa.list_(pa.int64())),
            "price": pa.array([None if r % 5 == 0 else r / 8 for r in row], pa.float32()),
            "name": pa.array([f"n{r % 3}" for r in row], pa.string()).dictionary_encode(),
            "row": row,
        }
    )


@pytest.fixture
def log(tmp_path):
    folder = tmp_path / "log"
    folder.mkdir()
    pq.write_table(table(300), folder / "train-0.parquet", row_group_size=70)
    pq.write_table(table(200, 300), folder / "train-1.parquet", row_group_size=45)
    return open_log(folder, Schema(time="time", categorical=("tags",), floats=("price",)))


def whole(log) -> pa.Table:
    return pa.concat_tables(pq.read_table(file.path) for file in log.train.files)


def streamed(log, sample) -> list[int]:
    return [n for part in iter_columns(log.train, ["time"], sample=sample) for n in (part["time"] // 1000).tolist()]


@pytest.mark.parametrize("kind", ["rows", "block", "user"])
def test_the_written_rows_are_the_streamed_ones_with_all_columns_and_types(log, tmp_path, kind):
    sample = SampleConfig(kind=kind, rate=0.3, seed=2)
    new = open_log(write_sample(log, tmp_path / "new", sample, layout=LayoutConfig(row_group_rows=40)))
    assert new.schema == log.schema
    found, wanted = whole(new), streamed(log, sample)
    assert found["row"].to_pylist() == wanted
    assert found.schema.equals(whole(log).schema)
    assert found.to_pylist() == whole(log).take(pa.array(wanted)).to_pylist()
    assert (new.num_users, new.num_items) == (log.num_users, log.num_items)
    stream = InteractionStream(log.train, log.schema, StreamConfig(batch_size=16), sample=sample, columns=["time"])
    other = InteractionStream(new.train, new.schema, StreamConfig(batch_size=16), columns=["time"])
    rows = [sorted(t for batch in s for t in batch.time.tolist()) for s in (stream, other)]
    assert rows[0] == rows[1]
    assert new.sample_of["rows"] == 500
    assert SampleConfig(**new.sample_of["sample"]) == sample
    assert [file["fingerprint"] for file in new.sample_of["files"]] == [f["fingerprint"] for f in log.inputs()]
    assert new.is_part


@pytest.mark.parametrize("rows_in_memory", [30, 1000])
def test_shuffled_it_has_the_same_rows_in_an_order_of_its_own(log, tmp_path, rows_in_memory):
    sample = SampleConfig(rate=0.5)
    made = []
    for name in ("a", "b"):
        out = write_sample(log, tmp_path / name, sample, shuffle=True, shuffle_rows=rows_in_memory)
        assert sorted(p.name for p in out.iterdir()) == ["manifest.json", "train"]  # no bucket is left
        made.append(whole(open_log(out)))
    rows = made[0]["row"].to_pylist()
    assert sorted(rows) == streamed(log, sample)
    assert made[0].sort_by("row").to_pylist() == whole(log).take(pa.array(sorted(rows))).to_pylist()
    assert made[0].equals(made[1])
    assert abs(np.corrcoef(rows, np.arange(len(rows)))[0, 1]) < 5 / np.sqrt(len(rows))


@given(st.lists(st.integers(0, 40), max_size=6), st.integers(1, 60), st.integers(0, 3))
@settings(max_examples=25, deadline=None)
def test_buckets_lose_and_repeat_nothing(tmp_path_factory, parts, rows_in_memory, seed):
    buckets = BucketShuffle(tmp_path_factory.mktemp("b") / "buckets", sum(parts), rows_in_memory, seed)
    first = 0
    for rows in parts:
        buckets.add(table(rows, first))
        first += rows
    found = [row for part in buckets.tables() for row in part["row"].to_pylist()]
    assert sorted(found) == list(range(first))


def test_every_order_is_equally_likely(tmp_path):
    """Three rows in two buckets of one chunk each: chi square of the six orders over 900 seeds."""
    orders: dict[tuple[int, ...], int] = {}
    for seed in range(900):
        buckets = BucketShuffle(tmp_path / str(seed), 4, 2, seed)
        for row in range(3):
            buckets.add(pa.table({"row": [row]}))
        order = tuple(row for part in buckets.tables() for row in part["row"].to_pylist())
        orders[order] = orders.get(order, 0) + 1
    assert len(orders) == 6
    assert sum((n - 150) ** 2 / 150 for n in orders.values()) < 25.7  # p = 0.0001 with five degrees of freedom


def test_held_out_parts_side_tables_and_vocabularies_stay(tmp_path):
    made = open_log(synth(SynthConfig(users=80, items=150, rows=900, tastes=4, negatives=5), tmp_path / "synth"))
    new = open_log(write_sample(made, tmp_path / "new", SampleConfig(rate=0.2)))
    for part in ("test", "test_negatives"):
        old, kept = ([f.path for f in getattr(log, part).files] for log in (made, new))
        assert [pq.read_table(path) for path in old] == [pq.read_table(path) for path in kept]
    assert new.features("item").equals(made.features("item"))

    lines = "".join(f"u{n % 7},i{n % 61},{n},{n % 3}\n" for n in range(200))
    (tmp_path / "raw.csv").write_text(f"user,item,time,kind\n{lines}")
    config = IngestConfig(
        input=str(tmp_path / "raw.csv"),
        user="user",
        item="item",
        time="time",
        categorical=("kind",),
        holdout="last",
        negatives=5,
    )
    old = open_log(ingest(config, tmp_path / "ingested"))
    new = open_log(write_sample(old, tmp_path / "new2", SampleConfig(rate=0.2)))
    for side in ("user", "item"):
        assert new.vocabulary_fingerprint(side) == old.vocabulary_fingerprint(side)
        assert new.vocabulary(side).equals(old.vocabulary(side))
        assert new.counts(side).tolist() == old.counts(side).tolist()
    assert new.manifest["features"] == old.manifest["features"]
    assert (tmp_path / "new2" / "vocabulary" / "feature-kind.parquet").exists()


def test_a_sample_written_again_is_a_sample_of_the_same_log(log, tmp_path):
    sample = SampleConfig(rate=0.5, seed=3)
    first = open_log(write_sample(log, tmp_path / "first", sample))
    again = open_log(write_sample(first, tmp_path / "again", SampleConfig(rate=1.0), shuffle=True))
    assert again.sample_of == first.sample_of
    part = open_log(write_sample(first, tmp_path / "part", sample))
    assert part.sample_of["log"] == first.path
    copy = open_log(write_sample(log, tmp_path / "copy", SampleConfig(rate=1.0), shuffle=True))
    assert not copy.is_part
    split = open_log(leave_one_out(first, tmp_path / "split", by="random", negatives=0))
    assert split.is_part


def test_what_cannot_be_written_is_one_error_and_nothing_is_left(log, tmp_path):
    with pytest.raises(InputError, match="none of its 500 rows"):
        write_sample(log, tmp_path / "new", SampleConfig(rate=1e-9))
    path = log.train.files[1].path
    pq.write_table(table(200, 300).drop_columns("row"), path)
    lacking = open_log(log.path, log.schema)
    with pytest.raises(InputError, match=r"train-1\.parquet, row group 0: no column 'row'"):
        write_sample(lacking, tmp_path / "new", SampleConfig(rate=0.9))
    text = table(200, 300)
    pq.write_table(text.set_column(6, "row", pa.array(["x"] * 200)), path)
    with pytest.raises(InputError, match=r"train-1\.parquet, row group 0: other types than the first file"):
        write_sample(open_log(log.path, log.schema), tmp_path / "new", SampleConfig(rate=0.9), shuffle=True)
    wider = text.set_column(0, "user_id", text["user_id"].cast(pa.int64()))
    pq.write_table(wider, path)
    new = open_log(write_sample(open_log(log.path, log.schema), tmp_path / "new", SampleConfig(rate=0.9)))
    assert whole(new).schema.field("user_id").type == pa.int64()  # fits both
    assert sorted(p.name for p in tmp_path.iterdir()) == ["log", "new"]


def test_memory_is_that_of_row_groups_and_buckets_not_of_the_log(tmp_path):
    """200 row groups of 2,000 rows; the peak of Arrow's memory stays below a tenth of the rows."""
    folder = tmp_path / "log"
    folder.mkdir()
    rng = np.random.default_rng(0)
    with pq.ParquetWriter(folder / "train.parquet", pa.schema([("user_id", pa.int64()), ("item_id", pa.int64())])) as w:
        for _ in range(200):
            w.write_table(pa.table({"user_id": rng.integers(0, 99, 2000), "item_id": rng.integers(0, 99, 2000)}))
    log = open_log(folder)
    layout = LayoutConfig(row_group_rows=2000)
    for shuffle in (False, True):
        pool = pa.proxy_memory_pool(pa.default_memory_pool())
        before = pa.default_memory_pool()
        pa.set_memory_pool(pool)
        try:
            options = {"shuffle": shuffle, "shuffle_rows": 4000, "layout": layout}
            write_sample(log, tmp_path / f"new-{shuffle}", SampleConfig(rate=0.99), **options)
        finally:
            pa.set_memory_pool(before)
        assert pool.max_memory() < 0.2 * 400_000 * 16


def test_the_design_effect_is_the_ratio_of_variances(tmp_path):
    """On a log in the order of time and on a shuffled one: means over 200 samples of each kind."""
    rng = np.random.default_rng(1)
    time = np.arange(10_000) / 50 + rng.normal(0, 20, 10_000)
    ratios = {}
    for name, order in (("sorted", np.arange(10_000)), ("shuffled", rng.permutation(10_000))):
        folder = tmp_path / name
        folder.mkdir()
        columns = {"user_id": order % 50, "item_id": order % 70, "label": time[order]}
        pq.write_table(pa.table(columns), folder / "train.parquet", row_group_size=100)
        log = open_log(folder, Schema(label="label"))
        values = np.concatenate([part["label"] for part in iter_columns(log.train, ["label"])])
        means = {"block": [], "rows": []}
        for kind, found in means.items():
            for seed in range(200):
                found.append(values[members(log, SampleConfig(kind=kind, rate=0.1, seed=seed))].mean())
        ratio = np.var(means["block"]) / np.var(means["rows"])
        effect = design_effects(log.train, ["label"])["label"]
        assert 0.65 < ratio / effect.effect < 1.5
        assert effect.correlation == pytest.approx((effect.effect - 1) / 99)
        ratios[name] = effect.effect
    assert ratios["sorted"] > 50
    assert 0.5 < ratios["shuffled"] < 1.5


def members(log, sample):
    from recpress.data.sampling.selection import Selection

    selection = Selection(log.train, sample)
    parts, first = [], 0
    for place, group in enumerate(log.train.groups):
        chosen = selection.of(place)
        parts.append(first + (np.arange(group.num_rows) if chosen is None else chosen))
        first += group.num_rows
    return np.concatenate(parts)
