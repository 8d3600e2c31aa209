"""The TorchX components, as `torchx run` reads them."""

import subprocess
import sys
from pathlib import Path

import pytest
from recpress.launch import components

ROOT = Path(__file__).resolve().parents[2]


def torchx(*arguments):
    command = [str(Path(sys.executable).parent / "torchx")]
    return subprocess.run([*command, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize("stage", ["factorize", "hash", "train", "evaluate"])
def test_a_component_runs_its_stage_on_every_process(stage):
    app = getattr(components, stage)("--data", "a", j="2x3", cpu=4, mem_mb=1000)
    (role,) = app.roles
    assert role.num_replicas == 2
    assert "--nnodes 2 --nproc_per_node 3" in role.args[-1]
    assert role.args[-1].endswith(f"-m recpress.trainer.cli {stage} --data a")
    assert role.env["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] == "1"
    assert (role.resource.cpu, role.resource.memMB) == (4, 1000)


def test_torchx_takes_the_file():
    done = torchx("run", "-s", "local_cwd", "--dryrun", "launch/components.py:train", "-j", "2x3", "--", "--data", "a")
    assert done.returncode == 0, done.stderr
    assert "recpress.trainer.cli" in done.stdout


def test_a_wrong_argument_is_an_error_that_names_it():
    done = torchx("run", "-s", "local_cwd", "--dryrun", "launch/components.py:train", "--cores", "3")
    assert done.returncode != 0
    assert "--cores" in done.stderr + done.stdout


def test_components_import_no_torch():
    program = "import sys, recpress.launch.components; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=False).returncode == 0
