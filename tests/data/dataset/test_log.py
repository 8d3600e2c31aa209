"""Opening logs and reading their columns; every bad input is an error that names its place."""

import json
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recpress.data.config import LayoutConfig, SampleConfig, Schema, SynthConfig
from recpress.data.dataset.columns import Jagged, check_ids
from recpress.data.dataset.log import open_log
from recpress.data.errors import InputError
from recpress.data.sampling.bernoulli import membership
from recpress.data.sampling.scan import iter_columns
from recpress.data.synthetic.interactions import synth

DATA = Path(os.environ.get("RECPRESS_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))
FULL = Schema(label="label", time="time", categorical=("kind", "tags"), floats=("price",))


def table(rows=10, **columns):
    base = {"user_id": pa.array(np.arange(rows) % 4, pa.int32()), "item_id": pa.array(np.arange(rows) % 5)}
    return pa.table(base | columns)


def full(rows=10, **columns):
    more = {
        "label": pa.array(np.linspace(0, 1, rows)),
        "time": pa.array(np.arange(rows), pa.timestamp("us")),
        "kind": pa.array(np.arange(rows) % 3, pa.int8()),
        "tags": pa.array([list(range(k % 3)) for k in range(rows)], pa.list_(pa.int32())),
        "price": pa.array([None, *np.ones(rows - 1)], pa.float64()),
    }
    return table(rows, **(more | columns))


def write(folder, name, data, **options):
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(data, path, **options)
    return path


def negatives(user=(0, 1), item=(2, 3), lists=((0, 1), (4, 6))):
    return pa.table({"user_id": list(user), "pos_item_id": list(item), "negatives": pa.array([list(x) for x in lists])})


def test_plain_folder(tmp_path):
    write(tmp_path, "train.parquet", table(), row_group_size=4)
    write(tmp_path, "test.parquet", table(2))
    write(tmp_path, "test_negatives.parquet", negatives())
    log = open_log(tmp_path)
    assert (log.num_users, log.num_items) == (4, 7)  # item 6 is known from the negatives alone
    assert [group.num_rows for group in log.train.groups] == [4, 4, 2]
    assert log.counts("user").tolist() == [3, 3, 2, 2]
    assert log.counts("item").tolist() == [2, 2, 2, 2, 2, 0, 0]
    data = next(iter_columns(log.test_negatives, ["negatives"]))["negatives"]
    assert data.values.tolist() == [0, 1, 4, 6]
    assert data.lengths.tolist() == [2, 2]
    assert log.val is None


def test_columns_of_every_kind(tmp_path):
    write(tmp_path, "train.parquet", full())
    log = open_log(tmp_path, FULL)
    data = next(iter_columns(log.train, list(log.train.columns)))
    assert {name: column.dtype.name for name, column in data.items() if isinstance(column, np.ndarray)} == {
        "user_id": "int64",
        "item_id": "int64",
        "label": "float32",
        "time": "int64",
        "kind": "int64",
        "price": "float32",
    }
    assert data["tags"].offsets.tolist() == [0, 0, 1, 3, 3, 4, 6, 6, 7, 9, 9]
    assert np.isnan(data["price"][0])  # a missing float is NaN
    assert data["price"][1:].tolist() == [1] * 9


@pytest.mark.parametrize("layout", ["train.parquet", "train/a.parquet", "train-0.parquet"])
def test_layouts(tmp_path, layout):
    write(tmp_path / "log", layout, table())
    assert open_log(tmp_path / "log").train.num_rows == 10


def test_files_are_sorted_and_globs_and_uris_open(tmp_path):
    for name in ("b", "a", "c"):
        write(tmp_path / "x" / name, "part.parquet", table(ord(name) - 90))
    for path in (
        f"{tmp_path}/x/*/part.parquet",
        f"file://{tmp_path}/x/*/p*.parquet",
        f"{tmp_path}/x/[a-c]/*",
    ):
        log = open_log(path)
        assert [file.metadata.num_rows for file in log.train.files] == [7, 8, 9]
        assert log.test is None
    assert open_log(f"file://{tmp_path}/x/a/part.parquet").train.num_rows == 7
    with pytest.raises(InputError, match="no file matches"):
        open_log(f"{tmp_path}/x/*.parquet")  # a star stays within a folder


def test_credentials_in_an_address_are_refused_and_not_repeated():
    with pytest.raises(InputError, match="credentials") as error:
        open_log("s3://AKIAEXAMPLE:hush@bucket/log")
    assert "bucket/log" in str(error.value)
    assert "hush" not in str(error.value)
    assert "AKIA" not in str(error.value)


def test_empty_row_groups_are_skipped(tmp_path):
    with pq.ParquetWriter(tmp_path / "train.parquet", table().schema) as writer:
        for rows in (3, 0, 4):
            writer.write_table(table(rows))
    log = open_log(tmp_path)
    assert [(group.group, group.num_rows) for group in log.train.groups] == [(0, 3), (2, 4)]


def test_without_statistics_the_ids_are_read(tmp_path):
    write(tmp_path, "train.parquet", table(), write_statistics=False, row_group_size=3)
    assert (open_log(tmp_path).num_users, open_log(tmp_path).num_items) == (4, 5)


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_each_row_group_to_one_rank(tmp_path, world):
    write(tmp_path, "train.parquet", table(50, row=pa.array(np.arange(50))), row_group_size=7)
    log = open_log(tmp_path, Schema(floats=("row",)))
    ranks = [
        [part["row"] for part in iter_columns(log.train, ["row"], rank=rank, world=world)] for rank in range(world)
    ]
    rows = np.concatenate([part for parts in ranks for part in parts])
    assert sorted(rows.tolist()) == list(range(50))


def test_sample_and_complement(tmp_path):
    write(tmp_path, "train.parquet", full(1000, row=pa.array(np.arange(1000))), row_group_size=300)
    log = open_log(tmp_path, Schema(categorical=("tags",), floats=("row",)))
    sample = SampleConfig(rate=0.3, seed=7)
    inside = list(iter_columns(log.train, ["row", "tags"], sample=sample))
    outside = list(iter_columns(log.train, ["row"], sample=sample, complement=True))
    rows = np.concatenate([part["row"] for part in inside]).astype(int)
    assert rows[: len(inside[0]["row"])].tolist() == membership(7, 0.3, 0, 0, 300).tolist()
    assert sorted([*rows, *np.concatenate([part["row"] for part in outside]).astype(int)]) == list(range(1000))
    lengths = np.concatenate([part["tags"].lengths for part in inside])
    assert lengths.tolist() == (rows % 3).tolist()


def test_jagged_take():
    column = Jagged(np.arange(6), np.array([0, 2, 2, 6]))
    taken = column.take(np.array([2, 0, 1, 0]))
    assert taken.values.tolist() == [2, 3, 4, 5, 0, 1, 0, 1]
    assert taken.offsets.tolist() == [0, 4, 6, 6, 8]


@pytest.mark.parametrize(("ids", "message"), [([0, 3, -1, 5], "row 2: id -1"), ([0, 3, 5], "row 2: id 5 is outside")])
def test_check_ids(ids, message):
    check_ids(np.array([0, 4]), 5, "here")
    with pytest.raises(InputError, match=f"here, {message}"):
        check_ids(np.array(ids), 5, "here")


BAD_TRAIN = {
    "missing column": (
        table().drop_columns("item_id"),
        Schema(),
        r"train\.parquet: no column 'item_id'; .*found user_id",
    ),
    "mistyped id": (table(user_id=["a"] * 10), Schema(), r"column 'user_id': type string; expected integers"),
    "float id": (table(item_id=np.ones(10)), Schema(), r"column 'item_id': type double; expected integers"),
    "mistyped label": (full(label=["x"] * 10), FULL, r"column 'label': type string; expected numbers"),
    "mistyped list": (
        full(tags=[["x"]] * 10),
        FULL,
        r"column 'tags': type list<.*string>; expected integers, or lists",
    ),
    "null id": (
        table(user_id=[0, 1, 2, None, 4] * 2),
        Schema(),
        r"row group 0, column 'user_id', row 3: null",
    ),
    "negative id": (
        table(item_id=[0] * 8 + [-7, 0]),
        Schema(),
        r"row group 1, column 'item_id', row 3: id -7",
    ),
    "empty log": (table(0), Schema(), r"train\.parquet: no rows in train"),
}


@pytest.mark.parametrize("case", BAD_TRAIN)
def test_bad_train_is_refused_at_opening(tmp_path, case):
    data, schema, message = BAD_TRAIN[case]
    write(tmp_path, "train.parquet", data, row_group_size=5)
    with pytest.raises(InputError, match=message) as raised:
        open_log(tmp_path, schema)
    assert "\n" not in str(raised.value)


BAD_ROWS = {
    "NaN label": (full(label=[0.0] * 7 + [np.nan] * 3), "label", r"row group 1, column 'label', row 2: NaN"),
    "null label": (full(label=[0.0] * 9 + [None]), "label", r"row group 1, column 'label', row 4: null"),
    "null category": (full(kind=[0] * 6 + [None] * 4), "kind", r"row group 1, column 'kind', row 1: null"),
    "null in a list": (
        full(tags=[[1]] * 8 + [[], [1, None]]),
        "tags",
        r"row group 1, column 'tags', row 4: a null",
    ),
    "negative in a list": (full(tags=[[1]] * 6 + [[], [], [3, -2], [1]]), "tags", r"'tags', row 3: id -2"),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_bad_rows_are_refused_when_read(tmp_path, case):
    data, column, message = BAD_ROWS[case]
    write(tmp_path, "train.parquet", data, row_group_size=5)
    log = open_log(tmp_path, FULL)
    with pytest.raises(InputError, match=message):
        list(iter_columns(log.train, [column]))


def test_bad_files(tmp_path):
    path = write(tmp_path, "train.parquet", table(10_000), row_group_size=1000)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"train\.parquet: incomplete or not a Parquet file"):
        open_log(tmp_path)
    path.write_bytes(b"user_id,item_id\n1,2\n")
    with pytest.raises(InputError, match=r"train\.parquet: incomplete or not a Parquet file"):
        open_log(tmp_path)
    path.write_bytes(whole)
    log = open_log(tmp_path)
    path.write_bytes(whole[:40] + b"\xff" * 2000 + whole[2040:])  # damaged after it was opened
    with pytest.raises(InputError, match=r"train\.parquet, row group \d+: cannot be read"):
        list(iter_columns(log.train, ["user_id", "item_id"]))


def test_bad_places(tmp_path):
    for path, message in [
        (tmp_path / "nowhere", "nowhere: no such file or folder"),
        (tmp_path, r"no train\.parquet"),
        (f"{tmp_path}/*.parquet", "no file matches"),
        ("nothing://x/y", "nothing://x/y: cannot be opened"),
    ]:
        with pytest.raises(InputError, match=message):
            open_log(path)


@pytest.mark.parametrize(
    ("lists", "message"), [(((0, 1), ()), "row 1: an empty list"), (((0, -1), (1, 2)), "row 0: id -1")]
)
def test_bad_held_out_part(tmp_path, lists, message):
    write(tmp_path, "train.parquet", table())
    write(tmp_path, "test_negatives.parquet", negatives(lists=lists))
    with pytest.raises(InputError, match=rf"test_negatives\.parquet, row group 0, column 'negatives', {message}"):
        list(iter_columns(open_log(tmp_path).test_negatives, ["negatives"]))


def test_held_out_part_without_rows(tmp_path):
    write(tmp_path, "train.parquet", table())
    write(tmp_path, "test.parquet", table(0))
    with pytest.raises(InputError, match=r"test\.parquet: no rows in test"):
        open_log(tmp_path)


def test_column_outside_the_schema(tmp_path):
    write(tmp_path, "train.parquet", full())
    with pytest.raises(InputError, match="column 'label' is not in the schema; it names user_id, item_id"):
        next(iter_columns(open_log(tmp_path).train, ["label"]))


@pytest.mark.skipif(not (DATA / "ml-1m-ncf").is_dir(), reason="needs the real data (../shared/data or RECPRESS_DATA)")
def test_real_log():
    log = open_log(DATA / "ml-1m-ncf")
    assert (log.num_users, log.num_items, log.train.num_rows) == (6040, 3706, 994169)
    assert log.test.num_rows == 6040
    assert log.counts("item").sum() == 994169
    lists = next(iter_columns(log.test_negatives, ["negatives"]))["negatives"]
    assert set(lists.lengths.tolist()) == {99}


@pytest.fixture
def made(tmp_path):
    sizes = {"users": 60, "items": 120, "rows": 900, "tastes": 4, "negatives": 9}
    return synth(SynthConfig(**sizes, layout=LayoutConfig(row_group_rows=200)), tmp_path / "made")


def change_manifest(folder, **changes):
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_id_outside_the_vocabulary(made):
    items = open_log(made).num_items
    change_manifest(made, num_items=items - 40)
    log = open_log(made)
    for rows, column in ((log.train, "item_id"), (log.test, "item_id"), (log.test_negatives, "negatives")):
        with pytest.raises(
            InputError, match=r"row group \d, column '\w+', row \d+: id \d+ is outside the vocabulary of 80"
        ):
            list(iter_columns(rows, [column]))


def test_file_that_is_not_the_manifests(made):
    path = made / "test" / "part-00000.parquet"
    whole = path.read_bytes()
    path.write_bytes(whole + b" ")
    with pytest.raises(
        InputError, match=rf"part-00000\.parquet: {len(whole) + 1} bytes; the manifest says {len(whole)}"
    ):
        open_log(made)
    path.unlink()
    with pytest.raises(InputError, match=r"part-00000\.parquet: missing; the manifest names it"):
        open_log(made)


def test_artifact_of_another_kind_is_no_log(made):
    change_manifest(made, kind="factors")
    with pytest.raises(InputError, match="of kind 'factors'; expected kind 'log'"):
        open_log(made)


def test_side_table_of_other_ids(made):
    log = open_log(made)
    assert log.features("user").num_rows == 60
    change_manifest(made, num_users=61)
    with pytest.raises(InputError, match=r"users\.parquet: 60 rows; expected one for each of 61 users"):
        open_log(made).features("user")


def test_schema_of_the_manifest_can_be_replaced(made):
    assert open_log(made).schema == Schema(time="time")
    assert list(open_log(made, Schema()).train.columns) == ["user_id", "item_id"]


def test_fingerprints_tell_vocabularies_apart(made, tmp_path):
    write(tmp_path / "plain", "train.parquet", table())
    plain, log = open_log(tmp_path / "plain"), open_log(made)
    prints = {log.vocabulary_fingerprint("user"), log.vocabulary_fingerprint("item")}
    assert len(prints | {plain.vocabulary_fingerprint("user"), plain.vocabulary_fingerprint("item")}) == 4
    assert plain.inputs()[0]["rows"] == 10


def test_folders_beside_those_of_hive_are_named(tmp_path, caplog):
    rows = pa.table({"user_id": [0, 1], "item_id": [0, 1]})
    for name in ("day=1", "other", "_temporary"):
        write(tmp_path / name, "part-0.parquet", rows)
    assert open_log(tmp_path).train.num_rows == 2
    assert "its other folders are not read: other" in caplog.text.splitlines()[-1]


def test_a_text_file_is_pointed_to_ingest(tmp_path):
    (tmp_path / "ratings.csv").write_text("user_id,item_id\n1,2\n")
    with pytest.raises(InputError, match=r"ratings\.csv: incomplete or not a Parquet file.*recpress ingest"):
        open_log(str(tmp_path / "ratings.csv"))
    with pytest.raises(InputError, match=r"no train\.parquet.*; `recpress ingest` reads other formats"):
        open_log(tmp_path)


def test_a_folder_without_rows_or_text_needs_a_glob(tmp_path):
    (tmp_path / "a.parquet").touch()
    with pytest.raises(InputError, match="other names need a glob"):
        open_log(tmp_path)
