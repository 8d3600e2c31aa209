"""The benchmark of propagation on a tiny log."""

import json

import pytest

from recpress.benchmarks.propagation import main

pytestmark = pytest.mark.slow  # trains models


def test_ids_that_share_rows_gain_by_propagation(tmp_path):
    out = tmp_path / "out.json"
    small = ["--users", "600", "--items", "300", "--rows", "15000", "--factors", "8"]
    main([*small, "--methods", "modulo", "learned", "--out", str(out)])
    rows = {row["method"]: row for row in json.loads(out.read_text())["rows"]}
    assert list(rows) == ["Full table", "Modulo", "Learned, one row"]
    assert rows["Full table"]["of full, %"] == 100
    modulo = rows["Modulo"]
    assert modulo["Recall@10 propagated"] > 1.2 * modulo["Recall@10"]
    assert modulo["of full, %"] == pytest.approx(100 * modulo["Recall@10"] / rows["Full table"]["Recall@10"])
