"""The example of a script that resumes, on two ranks."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from recpress.data.config import SynthCriteoConfig
from recpress.data.synthetic.criteo import synth_criteo
from recpress.modules import IdMap

EXAMPLE = Path(__file__).parents[1] / "examples" / "resumable_dlrm.py"


@pytest.mark.slow
def test_a_resumed_run_ends_where_the_other_did(tmp_path: Path) -> None:
    log, out, maps = tmp_path / "log", tmp_path / "out", tmp_path / "maps"
    synth_criteo(SynthCriteoConfig(rows=3000, ids=500), log)
    ids = pq.read_metadata(log / "vocabulary" / "feature-C3.parquet").num_rows
    (maps / "C3").mkdir(parents=True)
    IdMap(rows=torch.arange(ids, dtype=torch.int32)[:, None] % 7, num_rows=7).save(maps / "C3")

    def run() -> str:
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d"]
        command += ["--rdzv-endpoint", "localhost:0", str(EXAMPLE), "--data", str(log), "--maps", str(maps)]
        command += ["--out", str(out), "--global-batch", "256", "--checkpoint-steps", "4"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    whole = run()
    found = re.findall(r"step 12: held-out log loss ([\d.]+)", whole)
    assert len(found) == 1
    assert "resumed" not in whole
    assert sorted(path.name for path in out.iterdir()) == ["step-00000004", "step-00000008", "step-00000012"]
    shutil.rmtree(out / "step-00000012")
    (out / "step-00000008" / ".metadata").unlink()  # killed while it wrote this one
    resumed = run()
    assert "resumed at step 4" in resumed
    assert re.findall(r"step 12: held-out log loss ([\d.]+)", resumed) == found
    shard = out / "step-00000012" / ".metadata"
    assert shard.exists()
