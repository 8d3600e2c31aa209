"""The benchmark of recommendations on a tiny log: `recommend` needs no more memory than it states."""

import json

import pytest

from recpress.benchmarks.recommend import main

pytestmark = pytest.mark.slow  # starts processes


def test_the_memory_statement_is_respected(tmp_path):
    out = tmp_path / "out.json"
    main(["--users", "3000", "--items", "30000", "--k", "20", "--rounds", "1", "--out", str(out)])
    rows = {row["program"]: row for row in json.loads(out.read_text())["rows"]}
    assert {"recpress recommend", "faiss", "implicit"} == set(rows)
    ours = rows["recpress recommend"]
    assert 0 < ours["peak MB"] < ours["stated MB"] < 600
    assert ours["users/s"] > 0
