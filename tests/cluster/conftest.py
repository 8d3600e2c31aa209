"""The cluster of a test session, and jobs on it by `torchx run -s slurm`."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.slurm import Slurm, wait_until

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "NODE_FAIL", "TIMEOUT")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.cluster)


def _unable() -> str | None:
    """Why there can be no cluster here; None where there can."""
    if os.geteuid() != 0:
        return "not root: namespaces and Slurm's daemons need it"
    done = subprocess.run([ROOT / "scripts" / "install-cluster.sh"], capture_output=True, text=True, check=False)
    if done.returncode:
        return (done.stderr or done.stdout).strip().splitlines()[-1]
    if subprocess.run(["ip", "netns", "add", "rpprobe"], capture_output=True, check=False).returncode:
        return "`ip netns add` is not allowed here"
    subprocess.run(["ip", "netns", "del", "rpprobe"], check=True)
    return None


@pytest.fixture(scope="session")
def slurm() -> Iterator[Slurm]:
    """Two idle nodes; ended with the session, whatever became of them."""
    reason = _unable()
    if reason:
        pytest.skip(reason)
    folder = Path(tempfile.mkdtemp(prefix="recpress-slurm-"))
    folder.chmod(0o755)  # munged runs as another user
    cluster = Slurm(folder)
    signal.signal(signal.SIGTERM, lambda *_: pytest.exit("terminated"))  # so that the daemons end with a killed session
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


class Jobs:
    """`torchx run -s slurm` from one folder, where the logs of the jobs come to lie."""

    def __init__(self, slurm: Slurm, folder: Path) -> None:
        self.slurm, self.folder = slurm, folder
        path = os.pathsep.join([str(BIN), os.environ["PATH"]])
        self.environment = {**slurm.environment, "PATH": path, "OMP_NUM_THREADS": "1"}

    def torchx(self, *words: str) -> str:
        """What `torchx WORDS` prints on standard output; AssertionError with its errors where it fails."""
        done = subprocess.run(
            [BIN / "torchx", *words],
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=180,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def submit(self, component: str, *args: str, options: tuple[str, ...] = ()) -> str:
        """Submit a component on 2 x 2 ranks; returns the job's number."""
        name = f"{ROOT}/launch/components.py:{component}"
        common = ["-j", "2x2", "--cpu", "4", "--mem_mb", "4000", *options]
        handle = self.torchx("run", "-s", "slurm", "--workspace", "", name, *common, "--", *args)
        return handle.strip().splitlines()[-1].rpartition("/")[2]

    def wait(self, job: str, *states: str, seconds: float = 400.0) -> str:
        """Return when the job is in one of the states (by default: has ended); its state."""
        states = states or ENDED
        try:
            wait_until(lambda: self.slurm.state(job).startswith(states), f"job {job} is {states}", seconds, every=0.3)
        except TimeoutError as error:
            error.add_note(f"it is {self.slurm.state(job)}\n{self.log(job)}")
            raise
        return self.slurm.state(job)

    def run(self, component: str, *args: str, options: tuple[str, ...] = ()) -> str:
        """Submit, wait, and expect success; returns the job's number."""
        job = self.submit(component, *args, options=options)
        assert self.wait(job) == "COMPLETED", self.log(job)
        return job

    def log(self, job: str) -> str:
        """All that the job has written until now."""
        return "\n".join(path.read_text(errors="replace") for path in sorted(self.folder.glob(f"slurm-{job}*")))

    def workers(self, node: str, command: str) -> list[int]:
        """Ids of the ranks of a command or script on a node, without torchrun, which has the same words in its line."""
        words = command if command.endswith(".py") else f"recpress.trainer.cli {command}"
        found = self.slurm.processes(node, words)
        launchers = (b"torchrun", b"torch.distributed.run")
        lines = {pid: Path(f"/proc/{pid}/cmdline").read_bytes() for pid in found}
        return [pid for pid, line in lines.items() if not any(launcher in line for launcher in launchers)]


@pytest.fixture(scope="session")
def jobs(slurm: Slurm, tmp_path_factory: pytest.TempPathFactory) -> Jobs:
    return Jobs(slurm, tmp_path_factory.mktemp("jobs"))


def weights(model: Path) -> dict[str, bytes]:
    """Every file of a model's weights."""
    files = sorted(path for path in (model / "weights").rglob("*") if path.is_file())
    assert files
    return {str(path.relative_to(model)): path.read_bytes() for path in files}


@pytest.fixture
def fresh(tmp_path: Path) -> Iterator[Path]:
    """A folder for what one test makes, on the storage that both nodes see."""
    yield tmp_path
    shutil.rmtree(tmp_path, ignore_errors=True)
