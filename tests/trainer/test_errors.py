"""Which errors are the user's, in one line, and which are bugs, with a traceback; what is left after a signal."""

import errno
import json
import logging
import os
import signal
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pytest
import torch

from recpress.data.errors import InputError
from recpress.modules.als.factorization import ALS
from recpress.modules.config import ALSConfig
from recpress.trainer import cli
from recpress.trainer.errors import RankFailed, explain, report
from recpress.trainer.observability.logging_setup import logging_to_stderr


def numpys() -> None:
    np.zeros(3) + np.zeros(4)


def ours() -> None:
    ALS(ALSConfig(factors=-1), 3, 3)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "out/x"), "out/x: No space left on device"),
        (PermissionError(errno.EACCES, "Permission denied", "out"), "out: Permission denied"),
        (MemoryError("Unable to allocate 7.28 TiB"), "out of memory: Unable to allocate"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), "out of memory"),
        (RuntimeError("CUDA error: invalid device ordinal"), "device cannot be used"),
        (RuntimeError("CUDA error: no kernel image is available for execution on the device"), "device cannot be used"),
        (
            RuntimeError("The NVIDIA driver on your system is too old (found version 11040). Please update"),
            "device cannot be used: The NVIDIA driver on your system is too old",
        ),
        (
            OSError("/site/fbgemm_gpu/fbgemm_gpu_config.so: undefined symbol: _ZN3c105ErrorC2E"),
            "fbgemm does not match torch",
        ),
        (
            AttributeError("'_OpNamespace' 'fbgemm' object has no attribute 'pruned_array_lookup'"),
            "expected the versions of one set",
        ),
        (
            NotImplementedError(
                "Could not run 'fbgemm::permute_2D_sparse_data' with arguments from the 'CUDA' backend."
            ),
            "fbgemm is a CPU build",
        ),
        (
            torch.distributed.DistBackendError(
                "NCCL error in: ProcessGroupNCCL.cpp, unhandled system error. Last error:\nBootstrap : no socket "
                "interface found"
            ),
            "NCCL finds no network",
        ),
        (RuntimeError("bind: Address already in use"), "another port"),
        (RuntimeError("Connection closed by peer [127.0.0.1]:4"), "another rank is lost"),
        (pa.ArrowInvalid("not a Parquet file"), "not a Parquet file"),
        (pa.ArrowNotImplementedError("no such cast"), "no such cast"),
        (torch.distributed.DistNetworkError("port in use"), "the ranks cannot connect to"),
        (InputError("a\nb"), "a b"),
        (RankFailed("rank 1 failed"), "rank 1 failed"),
        (ModuleNotFoundError("No module named 'fbgemm_gpu'", name="fbgemm_gpu"), "fbgemm_gpu is not installed"),
    ],
)
def test_what_a_user_can_mend_is_one_line(error, words):
    assert words in str(explain(error))


@pytest.mark.parametrize("error", [ValueError("boom"), KeyError("x"), RuntimeError("shape mismatch"), TypeError("t")])
def test_everything_else_is_a_bug(error):
    assert explain(error) is None


def test_a_value_error_is_the_users_only_where_our_modules_raise_it():
    with pytest.raises(ValueError, match="als: factors") as raised:
        ours()
    assert "als: factors" in str(explain(raised.value))
    with pytest.raises(ValueError, match="broadcast") as raised:
        numpys()
    assert explain(raised.value) is None


def test_an_error_that_ends_the_process_is_logged_and_printed_if_logging_is_not_configured(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    with logging_to_stderr("train"):
        report("rank 0 stalled")
    assert capsys.readouterr().err == "recpress [rank 1]: error: rank 0 stalled\n"
    monkeypatch.setattr(logging.root, "handlers", [])  # as outside of pytest
    report("rank 0 stalled")
    assert capsys.readouterr().err == "recpress [rank 1]: error: rank 0 stalled\n"


@pytest.mark.parametrize(("error", "status"), [(ValueError("boom"), 1), (MemoryError("7 TiB"), 2), (OSError("x"), 2)])
def test_a_bug_prints_its_traceback_and_says_so(error, status, monkeypatch, capsys, tmp_path):
    def stage(config):
        raise error

    file = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))
    monkeypatch.setattr(cli, "_load", lambda place, load=cli._load: stage if "prepare.stages" in place else load(place))
    assert cli.main(["synth", "--out", "x"]) == status
    said = capsys.readouterr().err
    assert ("Traceback" in said) == ("bug" in said) == (status == 1)
    assert json.loads(file.read_text())["message"]["message"] == str(error)


def test_sigterm_removes_what_is_not_finished(tmp_path):
    program = (
        "import sys, time\n"
        "from recpress.trainer import cli\n"
        "from recpress.data.dataset.artifact import writing\n"
        "def stage(config):\n"
        f"    with writing({str(tmp_path / 'out')!r}, 'x'):\n"
        "        print('begun', flush=True)\n"
        "        time.sleep(60)\n"
        "load = cli._load\n"
        "cli._load = lambda place: stage if 'prepare.stages' in place else load(place)\n"
        "sys.exit(cli.main(['synth', '--out', 'x']))\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, env=os.environ)
    assert process.stdout is not None
    assert process.stdout.readline() == b"begun\n"
    assert list(tmp_path.glob(".out.tmp-*"))
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 128 + signal.SIGTERM
    assert not list(tmp_path.glob("*"))
