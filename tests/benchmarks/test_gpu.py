"""The script for GPU machines where nothing can be installed, at toy sizes on the CPU."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

from recpress.benchmarks.gpu import QUESTIONS, summary

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
    found = {path.stem: json.loads(path.read_text()) for path in (tmp_path / "out").glob("*.json")}
    assert set(found) == {f"gpu_{question}" for question in QUESTIONS}
    assert all(result["machine"]["device"] == "CPU" and result["rows"] for result in found.values())
    speeds = [row["rows/s, our loop"] for row in found["gpu_train"]["rows"]]
    assert len(speeds) == 6
    assert min(speeds) > 0
    tables = {row["tables"]: row["tables MB"] for row in found["gpu_train"]["rows"]}
    assert tables["hashed, frozen int8"] < tables["frozen int8"] < tables["frozen fp32"]
    assert all(row["plan MB"] > row["tables MB"] for row in found["gpu_train"]["rows"])
    same = {row["compared"]: row["same bits"] for row in found["gpu_repeat"]["rows"]}
    assert same["our loop twice"]
    text = (tmp_path / "out" / "summary.txt").read_text()
    assert done.stdout.endswith(text)
    assert text.startswith("recpress on CPU\nceilings: copy GB/s ")


def test_when_the_time_is_over_what_is_known_is_written(tmp_path):
    env = {**os.environ, "PYTHON": sys.executable, "OUT": str(tmp_path / "out"), "OMP_NUM_THREADS": "1"}
    command = ["bash", "benchmarks/gpu.sh", "--device", "cpu", "--tiny", "--minutes", "0.001"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    text = (tmp_path / "out" / "summary.txt").read_text()
    *_, left = re.findall("out of time after 0.001 minutes, in: (.+)", text)
    questions = list(QUESTIONS)  # a fast machine answers one or two in that time
    assert left.split(", ") == questions[-len(left.split(", ")) :]
    assert (tmp_path / "out" / "gpu_ceilings.json").exists()


def test_without_a_gpu_one_line_says_why(tmp_path):
    env = {**os.environ, "PYTHON": sys.executable, "OUT": str(tmp_path / "out"), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(["bash", "benchmarks/gpu.sh"], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("gpu: error: device is cuda: ")
    assert done.stderr.count("\n") == 1


def test_the_summary_is_cut_at_a_line():
    rows = {"remap": [{"what": "x" * 50, "M ids/s": 1.5}] * 400}
    text = summary(rows, ["failed: train (RuntimeError: no)"], "H200")
    assert 11_000 < len(text) <= 12_000
    lines = text.splitlines()
    assert lines[:2] == ["recpress on H200", "failed: train (RuntimeError: no)"]
    assert set(lines[2:-1]) == {f"remap: what {'x' * 50}, M ids/s 1.5"}
    assert "JSON" in lines[-1]
