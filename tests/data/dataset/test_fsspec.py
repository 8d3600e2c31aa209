"""Logs and artifacts by schemes that pyarrow does not know and fsspec does."""

import sys
import threading
import zipfile

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recpress.data.config import StreamConfig, SynthConfig
from recpress.data.dataset import artifact, object_store
from recpress.data.dataset.files import resolve
from recpress.data.dataset.log import open_log
from recpress.data.errors import InputError
from recpress.data.stream.loader import InteractionStream
from recpress.data.synthetic.interactions import synth


@pytest.fixture
def memory():
    """fsspec's filesystem in memory, which all of a process share, emptied afterwards."""
    filesystem = fsspec.filesystem("memory")
    yield filesystem
    filesystem.rm("/", recursive=True)


@pytest.fixture
def archive(tmp_path):
    path = tmp_path / "log.zip"
    with zipfile.ZipFile(path, "w") as file:
        for number in range(4):
            users = np.arange(number * 50, number * 50 + 50)
            pq.write_table(pa.table({"user_id": users, "item_id": users % 9}), tmp_path / "part", row_group_size=20)
            file.write(tmp_path / "part", f"log/train-{number}.parquet")
    return path


@pytest.mark.parametrize("where", ["log", "log/train-*.parquet", "log/*-[0123].parquet"])
def test_a_log_in_an_archive_is_streamed_by_threads(archive, where):
    log = open_log(f"zip://{where}::{archive}")
    stream = InteractionStream(log.train, log.schema, StreamConfig(batch_size=16, num_threads=4))
    assert sorted(user for batch in stream for user in batch.user.tolist()) == list(range(200))
    assert log.train.where(log.train.groups[1]) == "zip://log/train-0.parquet, row group 1"
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("recpress-stream")]


def test_one_file_of_an_archive(archive):
    assert open_log(f"zip://log/train-2.parquet::{archive}").train.num_rows == 50
    with pytest.raises(InputError, match=r"train-9\.parquet.*: no such file or folder"):
        open_log(f"zip://log/train-9.parquet::{archive}")


def test_an_artifact_is_written_and_read(memory):
    made = SynthConfig(users=30, items=60, rows=200, tastes=4, tastes_per_user=2, held_out_users=5, negatives=3)
    synth(made, "memory://made/log")
    log = open_log("memory://made/log")
    assert (log.num_users, log.train.num_rows, log.manifest["kind"]) == (30, 200, "log")
    assert log.vocabulary("user") is None or log.vocabulary("user").num_rows == 30
    path = log.train.where_file(0)
    assert path.startswith("memory://made/log/train/")
    assert [file["fingerprint"] for file in log.inputs()] == [artifact.fingerprint(path)]
    with pytest.raises(InputError, match="memory://made/log: exists"):
        synth(made, "memory://made/log")
    memory.pipe(path.removeprefix("memory:/"), b"PAR1, and no more of it")
    with pytest.raises(InputError, match=rf"{path}: 23 bytes; the manifest says"):
        open_log("memory://made/log")


def test_a_file_that_came_later_is_seen(memory):
    object_store.write_bytes("memory://log/one", b"1")
    assert list(object_store.list_files("memory://log")) == ["one"]
    object_store.write_bytes("memory://log/two", b"2")
    assert list(object_store.list_files("memory://log")) == ["one", "two"]
    assert object_store.read_bytes("memory://log/two") == b"2"


def test_a_name_in_a_chain_comes_before_what_it_lies_in():
    assert (
        object_store.join("zip://log::s3://bucket/a.zip", "manifest.json")
        == "zip://log/manifest.json::s3://bucket/a.zip"
    )


@pytest.mark.parametrize(
    ("address", "says"),
    [
        ("nowhere://a/b", "nowhere://a/b: cannot be opened: Protocol not known: nowhere"),
        ("dropbox://a", r"dropbox://a: .*dropbox"),
        ("https://me:word@host/a.parquet", "https://…@host/a.parquet: credentials in an address"),
        ("zip://a::sftp://me:word@host/a.zip", "zip://a::sftp://…@host/a.zip: credentials in an address"),
        (
            "https://host/a.parquet?X-Amz-Signature=word",
            "https://host/a.parquet: option 'X-Amz-Signature': credentials",
        ),
        ("abfs://box@account/a?sas_token=word", "abfs://box@account/a: option 'sas_token': credentials"),
    ],
)
def test_an_address_that_cannot_be_used(address, says):
    with pytest.raises(InputError, match=says) as caught:
        resolve(address)
    assert "word" not in str(caught.value)


def test_without_fsspec_its_schemes_are_an_error_and_others_work(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(
        InputError, match=r"memory://log: scheme 'memory', expected one of file, s3, .* or an installed"
    ):
        resolve("memory://log")
    assert resolve(f"file://{tmp_path}")[1] == str(tmp_path)
