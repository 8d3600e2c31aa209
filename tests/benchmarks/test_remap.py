"""The cost of a map, at toy sizes: what is compared, and that TorchRec's module is filled."""

import json
import statistics

import torch

from recpress.benchmarks import remap


def test_each_way_is_compared_with_the_others(tmp_path, monkeypatch):
    tiny = ("--map-ids", "2600", "--ids", "500", "--runs", "2", "--mch-ids", "300", "--batch", "16")
    steps = ("--step-ids", "260", "--step-runs", "2", "--dim", "8")
    monkeypatch.setattr("sys.argv", ["remap.py", *remap.SMALL, *tiny, *steps, "--out", str(tmp_path / "remap.json")])
    remap.main()
    rows = json.loads((tmp_path / "remap.json").read_text())["rows"]
    lookups = [row for row in rows if "M ids/s" in row]
    assert {row["ids"] for row in lookups} == {"uniform", "skewed"}
    assert all(row["M ids/s"] > 0 for row in lookups)
    assert {row["x torch.remainder"] for row in lookups if row["what"] == "torch.remainder"} == {1.0}
    assert {row["x TorchRec MCH"] for row in lookups if row["what"] == "TorchRec MCH, eval"} == {1.0}
    steps_of = {row["what"]: row["ms"] for row in rows if "ms" in row}
    assert set(steps_of) == {f"DLRM step: {name}" for name in ("plain", "LearnedHash", "compress", "hash alone")}
    assert min(steps_of.values()) > 0


def test_the_module_of_torchrec_knows_the_ids_that_fill_it():
    torch.manual_seed(0)
    filled = remap.filled_mch(torch.arange(100), 40)
    known = filled._mch_sorted_raw_ids[:39]
    assert known.tolist() == sorted(set(known.tolist()))
    assert 0 <= int(known.min()) <= int(known.max()) < 100


def test_jobs_take_turns_after_one_run_that_warms_up():
    order: list[str] = []
    jobs = {name: lambda name=name: order.append(name) for name in ("a", "b")}
    found = remap.interleaved(jobs, 2, torch.device("cpu"))
    assert "".join(order) == "baabba"
    assert {name: len(seconds) for name, seconds in found.items()} == {"a": 2, "b": 2}
    assert remap.ratio([1.0, 2.0, 4.0], [2.0, 2.0, 2.0]) == statistics.median([2.0, 1.0, 0.5])
