"""An artifact is whole or absent."""

import json

import numpy as np
import pytest

from recpress.data.dataset import artifact
from recpress.data.errors import InputError


def make(path, **options):
    meta = {"config": {"a": 1}}
    with artifact.writing(path, "thing", meta, **options) as tmp:
        (tmp / "data.bin").write_bytes(b"x")
        meta["counts"] = {"rows": np.int64(3)}
    return path


def test_written_and_read(tmp_path):
    path = make(tmp_path / "deep" / "a")
    manifest = artifact.read_manifest(path, "thing")
    assert manifest["config"] == {"a": 1}
    assert manifest["counts"] == {"rows": 3}
    assert (path / "data.bin").read_bytes() == b"x"
    assert [entry.name for entry in path.parent.iterdir()] == ["a"]


def test_nothing_is_left_after_an_error(tmp_path):
    def fail(folder):
        (folder / "data.bin").write_bytes(b"x")
        raise RuntimeError

    with pytest.raises(RuntimeError), artifact.writing(tmp_path / "a", "thing") as tmp:
        fail(tmp)
    assert list(tmp_path.iterdir()) == []


def test_a_manifest_that_cannot_be_written_leaves_nothing(tmp_path):
    with pytest.raises(TypeError), artifact.writing(tmp_path / "a", "thing", {"bad": object()}):
        pass
    assert list(tmp_path.iterdir()) == []


def test_overwrite_replaces_only_artifacts(tmp_path):
    path = make(tmp_path / "a")
    with pytest.raises(InputError, match=r"a: exists already.*--overwrite"):
        make(path)
    (path / "old").touch()
    make(path, overwrite=True)
    assert not (path / "old").exists()
    precious = tmp_path / "home"
    precious.mkdir()
    (precious / "thesis").touch()
    with pytest.raises(InputError, match="home: exists and is not an artifact"):
        make(precious, overwrite=True)
    assert (precious / "thesis").exists()
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["a", "home"]


def test_a_failed_overwrite_keeps_the_old(tmp_path):
    path = make(tmp_path / "a")
    with pytest.raises(RuntimeError), artifact.writing(path, "thing", overwrite=True):
        raise RuntimeError
    assert artifact.read_manifest(path, "thing")["counts"] == {"rows": 3}


def test_several_writers(tmp_path):
    tmp = artifact.begin(tmp_path / "a")
    for rank in range(3):
        (tmp / f"part-{rank}").write_text(str(rank))
    artifact.commit(tmp, tmp_path / "a", "thing", {})
    assert sorted(entry.name for entry in (tmp_path / "a").iterdir()) == [
        "manifest.json",
        "part-0",
        "part-1",
        "part-2",
    ]
    other = artifact.begin(tmp_path / "b")
    artifact.abort(other)
    assert not other.exists()


def test_refusals_name_what_and_why(tmp_path):
    path = make(tmp_path / "a")
    with pytest.raises(InputError, match="a: an artifact of kind 'thing'; expected kind 'factors'"):
        artifact.read_manifest(path, "factors")
    with pytest.raises(InputError, match=r"no manifest\.json"):
        artifact.read_manifest(tmp_path / "missing", "thing")
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(manifest | {"version": 99}))
    with pytest.raises(InputError, match="format version 99; this release reads version 1"):
        artifact.read_manifest(path, "thing")
    (path / "manifest.json").write_text("{")
    with pytest.raises(InputError, match="not JSON"):
        artifact.read_manifest(path, "thing")
    (path / "manifest.json").write_text("[]")
    with pytest.raises(InputError, match="not a manifest"):
        artifact.read_manifest(path, "thing")


@pytest.mark.parametrize("size", [0, 10, (1 << 20) + 5])
def test_fingerprint_sees_both_ends_and_the_size(tmp_path, size):
    path = tmp_path / "f"
    path.write_bytes(bytes(size))
    first = artifact.fingerprint(path)
    assert artifact.fingerprint(path) == first
    path.write_bytes(bytes(size) + b"\0")
    assert artifact.fingerprint(path) != first
    if size:
        for place in (0, size - 1):
            changed = bytearray(size)
            changed[place] = 1
            path.write_bytes(changed)
            assert artifact.fingerprint(path) != first


def test_an_output_is_apart_from_the_inputs(tmp_path, monkeypatch):
    log = tmp_path / "log"
    (log / "train").mkdir(parents=True)
    (log / "train" / "a.parquet").touch()
    (tmp_path / "link").symlink_to(log)
    for out, given in (
        (log, log),
        (tmp_path / "link", log),
        (log / "factors", log),
        (log / "factors", tmp_path / "link"),
        (tmp_path, log),
        (log, log / "train" / "a.parquet"),
        (log, f"{log}/train/*.parquet"),
        (log, f"file://{log}"),
        (f"file://{log}", log),
    ):
        with pytest.raises(InputError, match=r"output (is|is in|contains) the input"):
            artifact.check_target(out, True, "thing", [given])
    for out in (tmp_path / "log2", tmp_path / "lo", log / "train2"):
        artifact.check_target(out, False, "thing", [f"{log}/*/a.parquet"])
    artifact.check_target(tmp_path / "log2", False, "thing", [log, ""])
    make(tmp_path / "made")
    with pytest.raises(InputError, match="inside the artifact"):
        artifact.begin(tmp_path / "made" / "deep" / "a")
    with pytest.raises(InputError, match=r"made: .*kind 'thing'.*'log'"):
        artifact.begin(tmp_path / "made", overwrite=True, kind="log")
    monkeypatch.chdir(log)
    for name in ("", ".", "..", "./", "~/x", "s3:/bucket/x"):
        with pytest.raises(InputError, match=r"empty name|working folder|only shells expand|two slashes"):
            artifact.begin(name, overwrite=True)
    assert sorted(entry.name for entry in log.iterdir()) == ["train"]
