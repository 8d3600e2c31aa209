"""A run in order prints no warnings of libraries."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from recpress.data.config import SynthConfig
from recpress.data.synthetic.interactions import synth


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_pipeline_prints_no_warnings(tmp_path, ranks):
    log = synth(
        SynthConfig(users=900, items=300, rows=20_000, tastes=6, tastes_per_user=3, negatives=9), tmp_path / "log"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--standalone"]
    command += ["-m", "recpress.trainer.cli", "pipeline", "--data", str(log), "--out", str(tmp_path / "out")]
    command += ["--factorize.als.factors", "8", "--device", "cpu"]
    done = subprocess.run(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=170, check=False
    )
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stderr.splitlines() if "warning" in line.lower()]
    assert not said
    assert "factorization" in done.stdout
