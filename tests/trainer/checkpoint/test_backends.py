"""Checkpoints in a folder: which are complete, which are kept, and what is corrupt."""

import json

import pytest

from recpress.data.errors import InputError
from recpress.trainer.checkpoint.backends import RUN, CorruptCheckpoint, LocalBackend
from recpress.trainer.checkpoint.file_bytes import describe


def save(backend, name, best_step=None):
    staging = backend.staging(backend.begin(name))
    (staging / RUN).write_text(json.dumps({"best_step": best_step}))
    backend.commit(staging, name, {"version": 2, "files": {RUN: describe(staging / RUN)}})
    backend.end(staging)


@pytest.fixture
def backend(tmp_path):
    made = LocalBackend(str(tmp_path / "checkpoints"), 0)
    made.prepare()
    return made


def test_old_checkpoints_and_weights_that_none_refers_to_are_removed(backend):
    for step in (1, 2, 3):
        save(backend, f"best-{step:08d}")
        save(backend, f"step-{step:08d}", best_step=step)
    (backend.path / "step-00000009").mkdir()  # incomplete, of a later step
    backend.prune("step-00000003", keep=2)
    left = sorted(path.name for path in backend.path.iterdir())
    assert left == ["best-00000002", "best-00000003", "step-00000002", "step-00000003"]


def test_a_corrupt_file_is_named(backend):
    save(backend, "step-00000001")
    manifest, run = backend.read("step-00000001")
    assert run == {"best_step": None}
    backend.check("step-00000001", manifest, 1)
    path = backend.path / "step-00000001" / RUN
    path.write_bytes(path.read_bytes().replace(b"null", b"1234"))
    with pytest.raises(CorruptCheckpoint, match=r"run\.json: corrupt, its checksum"):
        backend.check("step-00000001", manifest, 1)
    path.unlink()
    with pytest.raises(CorruptCheckpoint, match="is missing"):
        backend.check("step-00000001", manifest, 1)


def test_a_folder_without_a_manifest_is_incomplete(backend):
    (backend.path / "step-00000004").mkdir()
    assert backend.steps() == ["step-00000004"]
    with pytest.raises(CorruptCheckpoint, match="No such file"):
        backend.read("step-00000004")


def test_a_file_in_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "checkpoints").touch()
    with pytest.raises(InputError, match="cannot hold checkpoints"):
        LocalBackend(str(tmp_path / "checkpoints"), 0).prepare()
