"""How files, folders and columns are found: by exact names, whatever else lies around them."""

import logging
from datetime import date

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recpress.data.config import Schema
from recpress.data.dataset.column_chunks import leaves
from recpress.data.dataset.log import open_log
from recpress.data.errors import InputError
from recpress.data.sampling.scan import iter_columns


def table(rows=12, **columns):
    return pa.table({**columns, "user_id": np.arange(rows) % 4, "item_id": np.arange(rows) % 6})


def write(path, data, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(data, path, **options)
    return path


def rows_of(log, names=("user_id", "item_id")):
    return [np.concatenate([data[name] for data in iter_columns(log.train, list(names))]).tolist() for name in names]


@pytest.mark.parametrize(
    "other",
    [
        {"item_id.x": np.arange(12) * 1000},
        {"item_id.list.element": np.arange(12) * 1000},
        {"user_id.name": [f"n{k}" for k in range(12)], "item_id.": [None] * 12},
        {"item_id.x": [{"item_id": -k} for k in range(12)], "meta": [{"item_id": [k]} for k in range(12)]},
    ],
)
def test_a_column_with_a_dot_is_not_taken_for_the_one_before_the_dot(tmp_path, other):
    write(tmp_path / "train.parquet", table(**other), row_group_size=5)
    log = open_log(tmp_path)
    assert (log.num_users, log.num_items) == (4, 6)
    assert rows_of(log) == [[k % 4 for k in range(12)], [k % 6 for k in range(12)]]


def test_a_column_with_a_dot_beside_a_struct_of_the_same_path(tmp_path):
    data = table(tags=[{"x": k, "y": "a"} for k in range(12)], **{"tags.x": [[k, k] for k in range(12)]})
    write(tmp_path / "train.parquet", data)
    log = open_log(tmp_path, Schema(categorical=("tags.x",)))
    assert leaves(log.train.files[0].metadata, ["tags.x"]) == [2]
    read = next(iter_columns(log.train, ["tags.x"]))["tags.x"]
    assert read.values.tolist() == [k for k in range(12) for _ in range(2)]
    assert log.train.read_table(log.train.groups[0], data.column_names).to_pylist() == data.to_pylist()


def test_views_are_read_as_what_they_view(tmp_path):
    data = table(
        tags=pa.array([[k % 3] * (k % 2) for k in range(12)], pa.list_view(pa.int32())),
        text=pa.array(["a"] * 12, pa.string_view()),
        deep=pa.array([{"x": ["b"]}] * 12, pa.struct([("x", pa.list_view(pa.string_view()))])),
        raw=pa.array([b"c"] * 12, pa.binary_view()),
    )
    write(tmp_path / "train.parquet", data)
    log = open_log(tmp_path, Schema(categorical=("tags",)))
    assert next(iter_columns(log.train, ["tags"]))["tags"].lengths.tolist() == [k % 2 for k in range(12)]
    read = log.train.read_table(log.train.groups[0], data.column_names)
    assert read.to_pylist() == data.to_pylist()
    assert "view" not in str(read.schema)
    assert read.schema.remove_metadata() == log.train.files[0].schema.remove_metadata()


def test_one_form_of_a_part_or_a_refusal_that_names_both(tmp_path):
    write(tmp_path / "train.parquet", table())
    write(tmp_path / "train-old.parquet", table(3))
    with pytest.raises(InputError, match=r"both train-old\.parquet and train\.parquet are train"):
        open_log(tmp_path)
    (tmp_path / "train-old.parquet").unlink()
    write(tmp_path / "train" / "a.parquet", table(3))
    with pytest.raises(InputError, match=r"both train and train\.parquet are train"):
        open_log(tmp_path)
    (tmp_path / "train" / "a.parquet").rename(tmp_path / "train" / "_a.parquet")  # a writer's own
    write(tmp_path / "val" / "a.parquet", table(2))
    write(tmp_path / "validation.parquet", table(2))
    with pytest.raises(InputError, match=r"both val and validation\.parquet are val"):
        open_log(tmp_path)


def test_val_is_a_part_of_any_of_its_names(tmp_path):
    for name in ("val.parquet", "val/a.parquet", "val-0.parquet", "validation-00000-of-00001.parquet"):
        folder = tmp_path / name.replace("/", "+")
        write(folder / "train.parquet", table())
        write(folder / name, table(2))
        write(folder / "test.parquet", table(3))
        log = open_log(folder)
        assert (log.train.num_rows, log.val.num_rows, log.test.num_rows) == (12, 2, 3)
        assert set(log.val.columns) == {"user_id", "item_id"}
        assert log.val.columns["user_id"].limit == log.num_users


def test_folders_below_a_part_are_read_and_what_is_not_read_is_named(tmp_path, caplog):
    write(tmp_path / "train" / "2024" / "01" / "a.snappy.parquet", table(5))
    write(tmp_path / "train" / "000000_0", table(3))
    write(tmp_path / "train" / "_temporary" / "0" / "a.parquet", table(99))
    write(tmp_path / "train" / ".a.parquet.crc", table(99))
    (tmp_path / "train" / "_SUCCESS").touch()
    assert open_log(tmp_path).train.num_rows == 8
    assert not caplog.messages
    (tmp_path / "train" / "a.csv").touch()
    write(tmp_path / "tests.parquet", table(5))
    with caplog.at_level(logging.WARNING):
        assert open_log(tmp_path).train.num_rows == 8
    assert "tests.parquet" in caplog.text
    assert "train/a.csv" in caplog.text


def test_partition_columns_are_columns(tmp_path):
    for day in (1, 2):
        for user in (3, 0):
            folder = tmp_path / f"day=2024-01-0{day}" / f"user_id={user}"
            write(folder / "part-0.snappy.parquet", pa.table({"item_id": [day, user]}))
    (tmp_path / "_SUCCESS").touch()
    write(tmp_path / "_temporary" / "day=2024-01-03" / "user_id=9" / "part-0.parquet", pa.table({"item_id": [9]}))
    for path in (tmp_path, f"{tmp_path}/*/*/*.parquet", f"{tmp_path}/day=2024-01-01/*/*.parquet"):
        log = open_log(path, Schema(time="day"))
        assert (log.num_users, log.num_items) == (4, 4)
        users, items, days = rows_of(log, ("user_id", "item_id", "day"))
        assert users[:4] == [0, 0, 3, 3]
        assert items[:4] == [1, 0, 1, 3]
        assert days[0] == (date(2024, 1, 1) - date(1970, 1, 1)).days * 86400
        assert log.counts("user").tolist() == [len(users) // 2, 0, 0, len(users) // 2]
    file = f"{tmp_path}/day=2024-01-01/user_id=3/part-0.snappy.parquet"
    assert rows_of(open_log(file)) == [[3, 3], [1, 3]]


def test_partitions_that_do_not_fit(tmp_path):
    write(tmp_path / "train" / "a.parquet", table())
    write(tmp_path / "train" / "day=1" / "a.parquet", table())
    with pytest.raises(InputError, match=r"day=1/a\.parquet: .*'day', but none in .*train/a\.parquet"):
        open_log(tmp_path)
    write(tmp_path / "x" / "train" / "user_id=007" / "a.parquet", pa.table({"item_id": [1]}))
    with pytest.raises(InputError, match=r"'user_id': type string; expected integers; `recpress ingest`"):
        open_log(tmp_path / "x")
    write(tmp_path / "y" / "user_id=__HIVE_DEFAULT_PARTITION__" / "a.parquet", pa.table({"item_id": [1]}))
    write(tmp_path / "y" / "user_id=1" / "a.parquet", pa.table({"item_id": [1]}))
    with pytest.raises(InputError, match="'user_id', row 0: null"):
        open_log(tmp_path / "y")
    # Polars writes the column into the files, too: these have its exact type.
    write(tmp_path / "z" / "user_id=5" / "a.parquet", pa.table({"user_id": [5], "item_id": [1]}))
    assert rows_of(open_log(tmp_path / "z")) == [[5], [1]]


@pytest.mark.parametrize("name", ["run[1]", "s*r", "q?x", "[ab]", "a*[", "day=1+2", "per%20cent", "a b", "ünï"])
def test_what_exists_is_literal_and_only_other_names_are_globs(tmp_path, name):
    write(tmp_path / "srxr" / "train.parquet", table(7))
    folder = tmp_path / name
    write(folder / "train.parquet", table(5))
    write(folder / "more" / "x[1].parquet", table(3))
    for path, rows in (("", 5), ("/train.parquet", 5), ("/*.parquet", 5), ("/more/x[1].parquet", 3), ("/*/x*", 3)):
        assert open_log(f"{folder}{path}").train.num_rows == rows
    with pytest.raises(InputError, match=r"no file matches|no such file"):
        open_log(f"{folder}/*.csv")


def test_a_glob_matches_no_hidden_names(tmp_path):
    write(tmp_path / "a.parquet", table(5))
    write(tmp_path / "._a.parquet", table(7))
    write(tmp_path / "_b.parquet", table(9))
    assert open_log(f"{tmp_path}/*.parquet").train.num_rows == 5
    assert open_log(f"{tmp_path}/_*.parquet").train.num_rows == 9


@pytest.mark.parametrize(
    ("column", "ids", "kind"),
    [
        ("user_id", [1, 2, 10**12], pa.int64()),
        ("user_id", [1, 2, 2**63 - 1], pa.int64()),
        ("item_id", [5_000_000_000, 2, 3], pa.int64()),
        ("item_id", [2**64 - 1, 2, 3], pa.uint64()),
        ("item_id", [10**9, 2, 3], pa.uint32()),
    ],
)
@pytest.mark.parametrize("statistics", [True, False])
def test_raw_ids_are_not_taken_for_dense_ones(tmp_path, column, ids, kind, statistics):
    data = table(3)
    data = data.set_column(data.schema.get_field_index(column), column, pa.array(ids, kind))
    write(tmp_path / "train.parquet", data, write_statistics=statistics)
    with pytest.raises(InputError, match=rf"train\.parquet, row group 0, column '{column}'") as error:
        open_log(tmp_path)
    assert str(max(ids)) in str(error.value) or not statistics
    assert "recpress ingest" in str(error.value)


def test_encrypted_files_are_named_as_such(tmp_path):
    encryption = pytest.importorskip("pyarrow.parquet.encryption")
    keys = {"footer": b"0123456789112345"}

    class Kms(encryption.KmsClient):
        def __init__(self, config):
            super().__init__()

        def wrap_key(self, key, name):
            return key.hex()

        def unwrap_key(self, wrapped, name):
            return bytes.fromhex(wrapped)

    factory = encryption.CryptoFactory(Kms)
    config = encryption.EncryptionConfiguration(footer_key="k", column_keys={"c": ["user_id"]})
    properties = factory.file_encryption_properties(encryption.KmsConnectionConfig(), config)
    with pq.ParquetWriter(tmp_path / "train.parquet", table().schema, encryption_properties=properties) as writer:
        writer.write_table(table())
    assert keys
    with pytest.raises(InputError, match=r"train\.parquet: encrypted"):
        open_log(tmp_path)


def test_fingerprints_are_taken_once(tmp_path, monkeypatch):
    from recpress.data.dataset import artifact

    for name in ("a", "b", "c"):
        write(tmp_path / "train" / f"{name}.parquet", table(4))
    taken = []
    plain = artifact.fingerprint
    monkeypatch.setattr(artifact, "fingerprint", lambda *given: taken.append(given) or plain(*given))
    log = open_log(tmp_path)
    assert log.inputs() == log.inputs()
    assert sorted(path.rpartition("/")[2] for path, _ in taken) == ["a.parquet", "b.parquet", "c.parquet"]
    assert log.inputs()[0]["fingerprint"] == plain(tmp_path / "train" / "a.parquet")
