"""What ends a command that writes a log."""

import os
import signal
import subprocess
import sys
import time

import pytest


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_leaves_nothing_behind(tmp_path, number, status):
    (tmp_path / "a.csv").write_text("user_id,item_id\n" + "".join(f"u{k},{k % 999}\n" for k in range(800_000)))
    command = [sys.executable, "-m", "recpress.trainer.cli", "ingest", "--input", str(tmp_path / "a.csv")]
    process = subprocess.Popen(
        [*command, "--out", str(tmp_path / "out")],
        stderr=subprocess.DEVNULL,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    deadline = time.monotonic() + 60
    while not any(name.startswith(".out") for name in os.listdir(tmp_path)) and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(number)
    assert process.wait(60) == status
    assert os.listdir(tmp_path) == ["a.csv"]
