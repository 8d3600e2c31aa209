"""A soak of half a second: its pace, and what it reports of the stream's memory."""

import json

import pytest

from recpress.benchmarks import soak


@pytest.mark.slow
def test_a_soak_compares_the_memory_with_its_bound_and_keeps_the_pace(tmp_path, monkeypatch):
    tiny = ("--minutes", "0.01", "--every", "0.01", "--rows", "2000", "--batch", "100", "--buffer-rows", "1000")
    out = ("--rows-per-second", "10000", "--out", str(tmp_path / "soak.json"))
    monkeypatch.setattr("sys.argv", ["soak.py", *soak.SMALL, *tiny, *out])
    soak.main()
    (row,) = json.loads((tmp_path / "soak.json").read_text())["rows"]
    assert 0 < 1e6 * row["M rows"] <= 10_000 * 0.6 + 300
    assert (row["log"], row["buffer rows"], row["sample"]) == ("narrow", 1000, 1.0)
    # negative if the system takes back memory of the process meanwhile
    assert row["at the end MB"] <= row["most MB"] < row["bound MB"]
    assert row["most / bound"] == pytest.approx(row["most MB"] / row["bound MB"])
