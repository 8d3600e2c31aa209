"""Files, artifacts and logs on an object store: whole or absent, whatever the server does."""

import json
import logging
import re
import time

import numpy as np
import pytest

from recpress.data.config import LayoutConfig, SynthConfig
from recpress.data.dataset import artifact, files, object_store
from recpress.data.dataset.log import open_log
from recpress.data.errors import InputError
from recpress.data.sampling.scan import iter_columns
from recpress.data.synthetic.interactions import synth
from tests.s3_server import s3  # noqa: F401  # a fixture

SMALL = SynthConfig(users=60, items=150, rows=600, tastes=4, held_out_users=20, negatives=5, layout=LayoutConfig())
PASSING = ["unavailable", "reset", "stall", "truncate"]


@pytest.fixture
def base(s3, request, monkeypatch, tmp_path):  # noqa: F811
    monkeypatch.setenv("RECPRESS_STORAGE_TIMEOUT", "1")
    monkeypatch.setenv("RECPRESS_STORAGE_PATIENCE", "0.2")
    monkeypatch.setenv("RECPRESS_CACHE", str(tmp_path / "cache"))
    s3.use(monkeypatch.setenv)
    return f"s3://bucket/{request.node.name.replace('[', '-').rstrip(']')}"


def make(path, data=b"x" * 1000, **options):
    with artifact.writing(path, "thing", {"a": 1}, **options) as tmp:
        (tmp / "deep").mkdir()
        (tmp / "deep" / "data.bin").write_bytes(data)
        (tmp / "small").write_bytes(b"s")
    return path


def test_bytes_files_and_folders(base, tmp_path):
    object_store.write_bytes(f"{base}/a/one", b"1")
    (tmp_path / "two").write_bytes(b"22")
    object_store.upload_file(tmp_path / "two", f"{base}/a/b/two")
    assert object_store.list_files(base) == {"a/b/two": 2, "a/one": 1}
    assert object_store.read_bytes(f"{base}/a/one") == b"1"
    object_store.fetch_file(f"{base}/a/b/two", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == b"22"
    object_store.remove(f"{base}/a/one")
    object_store.remove(f"{base}/a/one")
    assert object_store.list_files(base) == {"a/b/two": 2}
    object_store.remove_folder(base)
    assert object_store.list_files(base) == {}
    with pytest.raises(FileNotFoundError):
        object_store.read_bytes(f"{base}/a/one")


@pytest.mark.parametrize("name", ["file/x.json", "file/deeper/x.json"])
def test_a_path_below_a_file_is_refused_by_its_name(tmp_path, name):
    (tmp_path / "file").write_text("a")
    with pytest.raises(InputError, match=r"x\.json: cannot be written, because .*/file is a file; expected a folder"):
        object_store.write_bytes(tmp_path / name, b"1")


def test_options_stay_at_the_end_of_an_address():
    assert object_store.join("s3://bucket/a/?region=x", "b/c") == "s3://bucket/a/b/c?region=x"
    assert object_store.join("/tmp/a", "b?") == "/tmp/a/b?"
    assert object_store.beside("s3://bucket/a/?region=x", ".b") == "s3://bucket/a.b?region=x"
    assert object_store.beside("/tmp/a/", ".b") == "/tmp/a.b"


def test_an_artifact_comes_back_as_it_was(base):
    make(base)
    manifest = artifact.read_manifest(base, "thing")
    assert [entry["name"] for entry in manifest["contents"]] == ["deep/data.bin", "small"]
    assert object_store.list_files(base).keys() == {"deep/data.bin", "small", "manifest.json"}
    folder = artifact.fetch(base, manifest, "deep/*")
    assert (folder / "deep" / "data.bin").read_bytes() == b"x" * 1000
    assert not (folder / "small").exists()


def test_a_copy_is_fetched_once_and_anew_when_the_artifact_changes(base, s3):  # noqa: F811
    make(base)
    artifact.fetch(base, artifact.read_manifest(base))
    before = s3.count("GET .*data.bin")
    artifact.fetch(base, artifact.read_manifest(base))
    assert s3.count("GET .*data.bin") == before > 0
    make(base, b"other", overwrite=True)
    folder = artifact.fetch(base, artifact.read_manifest(base))
    assert (folder / "deep" / "data.bin").read_bytes() == b"other"


def test_overwriting_replaces_artifacts_alone(base):
    make(base)
    with pytest.raises(InputError, match="exists already"):
        make(base)
    object_store.write_bytes(f"{base}/stale", b"")
    make(base, overwrite=True)
    assert "stale" not in object_store.list_files(base)
    object_store.write_bytes(f"{base}-precious/thesis", b"")
    with pytest.raises(InputError, match="is not an artifact"):
        make(f"{base}-precious", overwrite=True)


def test_an_upload_that_breaks_leaves_no_manifest_and_can_be_repeated(base, s3):  # noqa: F811
    with s3.failing("unavailable", "PUT .*data.bin"), pytest.raises(InputError, match=r"data\.bin: cannot be written"):
        make(base)
    assert artifact.UNFINISHED in object_store.list_files(base)
    with pytest.raises(InputError, match=r"no manifest\.json"):
        artifact.read_manifest(base, "thing")
    make(base)
    assert artifact.UNFINISHED not in object_store.list_files(base)
    assert artifact.read_manifest(base, "thing")["a"] == 1


def test_a_broken_overwrite_is_not_taken_for_the_old_one(base, s3):  # noqa: F811
    make(base)
    with s3.failing("unavailable", "PUT .*data.bin"), pytest.raises(InputError):
        make(base, b"new", overwrite=True)
    with pytest.raises(InputError, match=r"no manifest\.json"):
        artifact.read_manifest(base, "thing")


def test_a_file_that_another_writer_changed_is_found_before_the_manifest_is_written(base, tmp_path):
    (tmp_path / "mine").write_bytes(b"mine")
    artifact.prepare(base)
    contents = artifact.upload(tmp_path, base, ["mine"])
    object_store.write_bytes(f"{base}/mine", b"another's")
    with pytest.raises(InputError, match="mine: 9 bytes, expected 4"):
        artifact.publish(base, "thing", {}, contents)
    assert artifact.MANIFEST not in object_store.list_files(base)


def test_a_file_that_is_not_as_the_manifest_says_is_refused(base):
    make(base)
    manifest = artifact.read_manifest(base)
    object_store.write_bytes(f"{base}/deep/data.bin", b"y" * 1000)
    with pytest.raises(InputError, match=r"data\.bin: not the file that the manifest lists"):
        artifact.fetch(base, manifest)
    manifest["contents"][0]["name"] = "../escape"
    with pytest.raises(InputError, match=r"lists '\.\./escape'"):
        artifact.fetch(base, manifest)


def test_an_answer_that_is_short_but_whole_by_its_headers_is_noticed(base, s3):  # noqa: F811
    make(base)
    manifest = artifact.read_manifest(base)
    with s3.failing("short", "GET .*data.bin", times=1):
        folder = artifact.fetch(base, manifest)
    assert (folder / "deep" / "data.bin").read_bytes() == b"x" * 1000


@pytest.mark.parametrize("fault", PASSING)
def test_a_passing_fault_is_not_noticed(base, s3, fault, tmp_path):  # noqa: F811
    object_store.write_bytes(f"{base}/file", b"data")
    with s3.failing(fault, "GET .*file", times=1) as rule:
        object_store.fetch_file(f"{base}/file", tmp_path / "file")
    assert rule.times == 0
    assert (tmp_path / "file").read_bytes() == b"data"


@pytest.mark.parametrize("fault", ["unavailable", "reset", "stall"])
def test_a_lasting_fault_is_one_error_that_names_the_file(base, s3, fault, tmp_path, caplog):  # noqa: F811
    object_store.write_bytes(f"{base}/file", b"data")
    with (
        caplog.at_level(logging.WARNING, "recpress"),
        s3.failing(fault, "GET .*file"),
        pytest.raises(InputError, match=rf"^{base}/file: cannot be read: AWS Error .* \(tried \d times\)$"),
    ):
        object_store.fetch_file(f"{base}/file", tmp_path / "file")
    assert "retrying in" in caplog.text
    assert list(tmp_path.iterdir()) == []


def test_an_operation_outlives_more_failures_than_one_request_may_have(base, s3, monkeypatch):  # noqa: F811
    monkeypatch.setenv("RECPRESS_STORAGE_PATIENCE", "30")
    object_store.write_bytes(f"{base}/file", b"data")
    with s3.failing("reset", "GET .*file", times=5) as rule:
        assert object_store.read_bytes(f"{base}/file") == b"data"
    assert rule.times == 0


def test_a_file_waits_on_disk_and_not_in_memory_for_a_store_that_takes_nothing(base, s3, monkeypatch, tmp_path):  # noqa: F811
    monkeypatch.setattr(object_store, "PIECE", 10 << 20)
    monkeypatch.setattr(object_store, "AHEAD", 2)
    (tmp_path / "large").write_bytes(bytes(60 << 20))
    with s3.failing("unavailable", "PUT .*partNumber="), pytest.raises(InputError, match="large: cannot be written"):
        object_store.upload_file(tmp_path / "large", f"{base}/large")
    found = [re.search(r"large.*partNumber=(\d+)", request) for request in s3.requests]
    assert {match[1] for match in found if match} == {"1", "2"}


def test_what_cannot_pass_is_not_tried_again(base, s3):  # noqa: F811
    object_store.write_bytes(f"{base}/file", b"data")
    began = len(s3.requests)
    with (
        s3.failing("denied", "file"),
        pytest.raises(InputError, match=rf"^{base}/file: cannot be read: .*ACCESS_DENIED"),
    ):
        object_store.read_bytes(f"{base}/file")
    assert len(s3.requests) - began <= 2
    with s3.failing("denied", "PUT"), pytest.raises(InputError, match=r"cannot be written: .*ACCESS_DENIED"):
        artifact.begin(f"{base}/new")
    with pytest.raises(InputError, match=r"^s3://absent/x\S+: cannot be written: .*NO_SUCH_BUCKET"):
        artifact.begin("s3://absent/x")
    with pytest.raises(InputError, match=r"^s3://absent/x: no such file or folder"):
        open_log("s3://absent/x")
    with pytest.raises(InputError, match=rf"^{base}/none: no such file"):
        object_store.cached_file(f"{base}/none")


def test_addresses_that_are_refused():
    for bad, problem in (
        ("s3://key:hush/more@bucket/a", "without credentials"),
        ("s3:///a", "expected s3://BUCKET/KEY"),
        ("s3://bucket/a?secret_key=hush", "option 'secret_key'"),
    ):
        with pytest.raises(InputError, match=problem) as error:
            files.resolve(bad)
        assert "hush" not in str(error.value)


def test_a_log_is_written_and_read(base, tmp_path):
    synth(SMALL, base)
    synth(SMALL, tmp_path / "log")
    there, here = open_log(base), open_log(tmp_path / "log")
    for log in (there, here):
        assert log.train.num_rows == 600
        assert log.features("item").num_rows == 150
    columns = [
        np.concatenate([data["item_id"] for data in iter_columns(log.train, ["item_id"])]) for log in (there, here)
    ]
    np.testing.assert_array_equal(*columns)


def test_a_row_group_is_read_again_and_then_named(base, s3):  # noqa: F811
    synth(SMALL, base)
    log = open_log(base)
    (group,) = log.train.groups
    want = log.train.read(group, ["user_id"])["user_id"]
    for fault in PASSING:
        with s3.failing(fault, "GET .*train/part", times=1):
            np.testing.assert_array_equal(log.train.read(group, ["user_id"])["user_id"], want)
    with (
        s3.failing("reset", "GET .*train/part"),
        pytest.raises(InputError, match=rf"^{base}/train/part-00000\.parquet, row group 0: cannot be read: .*tried"),
    ):
        log.train.read(group, ["user_id"])


def test_a_log_whose_upload_broke_is_no_log(base, s3):  # noqa: F811
    with s3.failing("unavailable", "PUT .*vocabulary|PUT .*items"), pytest.raises(InputError):
        synth(SMALL, base)
    assert any(name.startswith("train/") for name in object_store.list_files(base))
    with pytest.raises(InputError, match="incomplete: a run is writing this log"):
        open_log(base)


def test_a_server_that_never_answers_is_given_up(base, s3):  # noqa: F811
    began = time.monotonic()
    with s3.failing("stall"), pytest.raises(InputError, match="cannot be looked up"):
        object_store.list_files(base)
    assert time.monotonic() - began < 60  # not the hour of a hang


def test_what_was_listed_by_an_earlier_release_is_said(base):
    make(base)
    manifest = json.loads(object_store.read_bytes(f"{base}/manifest.json"))
    del manifest["contents"]
    with pytest.raises(InputError, match="does not list its files"):
        artifact.fetch(base, manifest)
