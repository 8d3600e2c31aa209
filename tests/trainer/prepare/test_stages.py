"""What ends a command that writes a log."""

import os
import signal
import subprocess
import sys
import time

STATUS = {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGHUP: 129}


def python_defaults():
    """As in a shell; a process of the background ignores SIGINT, one of nohup SIGHUP."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def test_a_signal_leaves_nothing_behind(tmp_path):
    (tmp_path / "a.csv").write_text("user_id,item_id\n" + "".join(f"u{k},{k % 999}\n" for k in range(2_000_000)))
    command = [sys.executable, "-m", "recpress.trainer.cli", "ingest", "--input", str(tmp_path / "a.csv")]
    folders = {number: tmp_path / number.name for number in STATUS}
    processes = {}
    for number, folder in folders.items():
        folder.mkdir()
        processes[number] = subprocess.Popen(
            [*command, "--out", str(folder / "out")], stderr=subprocess.DEVNULL, preexec_fn=python_defaults
        )
    deadline = time.monotonic() + 120
    for number, process in processes.items():
        # until it writes: the lock alone comes before
        while set(os.listdir(folders[number])) <= {".out.lock"} and time.monotonic() < deadline:
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(number)
    assert {number: process.wait(60) for number, process in processes.items()} == STATUS
    assert not [name for folder in folders.values() for name in os.listdir(folder)]
