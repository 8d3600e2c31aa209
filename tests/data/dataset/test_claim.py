"""One run at a time writes a target, and a killed run blocks nobody."""

import json
import os
import signal
import subprocess
import sys

import pytest

from recpress.data.dataset import artifact, claim
from recpress.data.errors import InputError

HOLD = """
import sys, time
from recpress.data.dataset import claim
claim.take(sys.argv[1])
print("held", flush=True)
time.sleep(99)
"""


@pytest.fixture
def holder(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "out")], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_a_second_run_is_refused_at_its_start_and_a_killed_one_is_not_waited_for(tmp_path, holder):
    leftover = tmp_path / ".out.tmp-12345678"
    leftover.mkdir()
    with pytest.raises(InputError, match=rf"another run writes to it \(process {holder.pid} on"):
        artifact.begin(tmp_path / "out")
    assert leftover.exists()  # it may be the other run's
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with artifact.writing(tmp_path / "out", "thing") as tmp:
        assert not leftover.exists()
        assert tmp.exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_process_may_claim_a_target_again_and_other_targets_beside_it(tmp_path, holder):
    with claim.claimed(tmp_path / "a"):
        tmp = artifact.begin(tmp_path / "a")
        artifact.abort(tmp)
        assert (tmp_path / ".a.lock").exists()  # the outer claim still holds
        with claim.claimed(f"{tmp_path}/./a/"):
            pass
    assert not (tmp_path / ".a.lock").exists()


def test_names_as_long_as_the_file_system_allows(tmp_path):
    for name in ("n" * 255, "é" * 127):
        with artifact.writing(tmp_path / name, "thing"):
            pass
        assert (tmp_path / name / artifact.MANIFEST).is_file()
    with pytest.raises(InputError, match=r"(?i)name too long"), artifact.writing(tmp_path / ("n" * 256), "thing"):
        pass
    assert len(list(tmp_path.iterdir())) == 2


def test_a_claim_on_an_object_store(tmp_path, monkeypatch):
    fsspec = pytest.importorskip("fsspec")
    monkeypatch.setattr(claim, "STALE_SECONDS", 0.3)
    store = fsspec.filesystem("memory")
    with claim.claimed("memory://claims/out"):
        mine = json.loads(store.cat("/claims/out.lock"))
        assert mine["pid"] == os.getpid()
    assert not store.exists("/claims/out.lock")

    store.pipe("/claims/out.lock", json.dumps(mine | {"pid": 2**22 + 1}).encode())  # of a process that is gone
    with claim.claimed("memory://claims/out"):
        pass
    store.pipe("/claims/out.lock", json.dumps(mine | {"machine": "other"}).encode())  # of a machine that writes no more
    with claim.claimed("memory://claims/out"):
        pass

    store.pipe("/claims/out.lock", json.dumps(mine | {"machine": "other"}).encode())
    beats = iter(range(99))

    def beat(_):
        store.pipe("/claims/out.lock", json.dumps(mine | {"machine": "other", "beats": next(beats)}).encode())

    monkeypatch.setattr(claim.time, "sleep", beat)
    with pytest.raises(InputError, match="out: another run writes to it"), claim.claimed("memory://claims/out"):
        pass
    store.rm("/claims/out.lock")
