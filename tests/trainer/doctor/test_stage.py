"""`recpress doctor` on a machine that is in order, and what it reports of one that is not."""

import json
import os
import stat
from pathlib import Path

import pytest

from recpress.trainer.cli import main
from recpress.trainer.doctor import stage
from tests.ranks import run_on_ranks


@pytest.fixture
def no_ranks(monkeypatch):
    """Two processes that import TorchRec take some seconds, once is enough."""
    monkeypatch.setattr("recpress.trainer.doctor.collectives.between_two_local_ranks", lambda seconds: "not measured")


def test_all_is_well_here(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RECPRESS_CACHE", str(tmp_path / "cache"))
    assert main(["doctor", "--json", "--timeout-seconds", "150"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ok"]
    assert found["versions"]["torch"].startswith("2.")
    checks = {check["name"]: check for check in found["checks"]}
    assert set(checks) == {
        *("versions", "packages", "devices", "backends", "cache folder", "current folder", "collectives"),
    }
    assert "2 ranks: all-reduce of 4 bytes" in checks["collectives"]["detail"]
    assert "gloo" in checks["backends"]["detail"]
    assert not any((tmp_path / "cache").iterdir())


def test_a_folder_that_cannot_be_written_fails(no_ranks, tmp_path, monkeypatch, capsys):
    file = tmp_path / "file"
    file.touch()
    monkeypatch.setenv("RECPRESS_CACHE", str(file / "cache"))
    with pytest.raises(SystemExit) as stop:
        main(["doctor"])
    assert stop.value.code == 1
    out = capsys.readouterr().out
    assert f"error    cache folder: NotADirectoryError: [Errno 20] Not a directory: '{file}/cache'" in out
    assert out.splitlines()[-1] == "1 checks failed"
    assert stat.S_ISREG(os.stat(file).st_mode)


def test_a_mismatched_set_fails_and_little_space_warns(no_ranks, monkeypatch, capsys):
    installed = {"torch": "2.13.0", "torchrec": "1.6.1", "fbgemm-gpu": "1.8.0"}
    monkeypatch.setattr("recpress.trainer.versions.installed_set", lambda: installed)
    monkeypatch.setattr(stage, "MIN_FREE_GIB", 1e9)
    with pytest.raises(SystemExit):
        main(["doctor"])
    out = capsys.readouterr().out
    assert "error    versions: versions do not match" in out
    assert "warning  current folder" in out
    assert "error    collectives: not measured" in out


def test_a_gpu_that_torch_cannot_use_is_a_warning_with_the_reason(no_ranks, monkeypatch, capsys):
    monkeypatch.setattr("recpress.trainer.distributed.process_group.GPU", Path(__file__))
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    monkeypatch.setattr("torch.version.cuda", None)
    main(["doctor"])
    assert "a GPU that torch cannot use: torch" in capsys.readouterr().out


def checks_of_ranks():
    from recpress.trainer.doctor.collectives import between_launched_ranks

    rank = int(os.environ["RANK"])
    return between_launched_ranks([{"name": "x", "status": "ok", "detail": "", "rank": rank}])


def test_ranks_of_a_launcher_are_all_reported():
    for found in run_on_ranks(checks_of_ranks, 2):
        assert [check["rank"] for check in found] == [0, 1, 0]
        assert "gloo, 2 ranks" in found[-1]["detail"]
