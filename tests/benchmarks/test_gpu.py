"""The script for GPU machines where nothing can be installed, at toy sizes on the CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
ABSENT = ("tyro", "torchx", "tabulate", "faiss", "implicit", "prometheus_client", "datasets", "torchdata")

# Python imports this at its start; it hides what such a machine lacks.
SITE = f"""
import sys
from importlib.machinery import PathFinder

class Without(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in {ABSENT!r} else super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Without
"""


def test_everything_runs_without_what_an_offline_machine_lacks(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(SITE)
    env = {**os.environ, "PYTHONPATH": str(tmp_path), "PYTHON": sys.executable, "OUT": str(tmp_path / "out")}
    command = ["bash", "benchmarks/gpu.sh", "--device", "cpu", "--tiny"]
    done = subprocess.run(command, cwd=ROOT, env=env | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = {path.stem: json.loads(path.read_text()) for path in (tmp_path / "out").iterdir()}
    assert set(found) == {f"gpu_{q}" for q in ("ceilings", "factorization", "remap", "train", "stream", "profile")}
    assert all(result["machine"]["device"] == "CPU" and result["rows"] for result in found.values())
    speeds = [row["rows/s, our loop"] for row in found["gpu_train"]["rows"]]
    assert len(speeds) == 6
    assert min(speeds) > 0
    tables = {row["tables"]: row["tables MB"] for row in found["gpu_train"]["rows"]}
    assert tables["hashed, frozen int8"] < tables["frozen int8"] < tables["frozen fp32"]
