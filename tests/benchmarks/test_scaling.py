"""The scaling benchmark: its table from known runs, and one case of one rank."""

import json
from argparse import Namespace

import pytest

from recpress.benchmarks import scaling


def result(step, compute, default=None):
    here = {"step": step, "compute": compute, "waiting": step - compute, "exchange CPU": 0.01, "bytes": 5e6}
    other = [here | {"step": default}] if default else []
    stretches = {"ours": [here], **({"default": other} if other else {})}
    return {"stretches": stretches, "transfer": 0.002, "collectives": 7}


def test_the_table_compares_neighbors_in_time(tmp_path, monkeypatch):
    """Two ranks take half the time of one in each round, although all of the second round is twice as slow."""
    monkeypatch.setattr("sys.argv", ["scaling.py"])
    runs = {
        scaling.ONE: [result(0.2, 0.19), result(0.4, 0.38)],
        scaling.NODE: [result(0.1, 0.08, default=0.08), result(0.2, 0.16, default=0.16)],
    }
    scaling.report(Namespace(batch=3000, out=str(tmp_path / "scaling.json"), worker=None), runs)
    one, two = json.loads((tmp_path / "scaling.json").read_text())["rows"]
    assert (one["ratio to 1 rank"], two["ratio to 1 rank"]) == (1, 2)
    assert (one["rows/s"], two["rows/s"]) == (10_000, 20_000)
    assert two["waiting ms"] == pytest.approx(30)
    assert (one["MB sent"], two["MB sent"]) == (0, 5)
    assert two["DDP's bucket setting"] == "+25.0 %"


@pytest.mark.slow
def test_one_rank_at_a_toy_size():
    args = Namespace(table_rows=500, dim=8, hidden=[8], batch=64, negatives=2, tables="trained", steps=2, stretches=1)
    found = scaling.run(args, [None])
    (stretch,) = found["stretches"]["ours"]
    assert stretch["step"] >= stretch["compute"] > 0
    assert found["collectives"] == 0
