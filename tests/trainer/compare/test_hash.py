"""`compare hash`, small: what it finds, writes and refuses."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from recpress.data.errors import InputError
from recpress.trainer.compare.hash import compare_hash
from recpress.trainer.compare.hash_result import format_hash_tables
from recpress.trainer.compare.hash_settings import NAMES
from recpress.trainer.compare.ties import difference
from recpress.trainer.config import EvaluationConfig
from tests.trainer.compare.configs import hash_config

pytestmark = pytest.mark.slow  # trains models


@pytest.fixture(scope="module")
def hashed(tmp_path_factory: pytest.TempPathFactory):
    out = tmp_path_factory.mktemp("compare") / "hash"
    return out, compare_hash(hash_config(out))


def test_all_methods_are_there_and_the_learned_map_is_ahead_of_the_hashing_trick(hashed) -> None:
    _, result = hashed
    assert [method.key for method in result.methods] == ["full", *[key for key in NAMES if key != "universal"]]
    recall = {method.key: method.mean("Recall@10") for method in result.methods}
    assert recall["learned-2"] > 1.5 * recall["modulo"]
    assert recall["learned"] > 1.5 * recall["modulo"]
    assert recall["full"] > recall["modulo"]


def test_rows_and_bytes_are_those_of_the_budget_with_the_map(hashed) -> None:
    _, result = hashed
    budget = round(0.15 * 900)
    for method in result.methods:
        if method.key != "full":
            assert method.rows <= budget
            assert method.bytes == method.rows * 8 * 4 + method.map_bytes
    assert result.method("modulo").map_bytes == 0
    assert result.method("learned").map_bytes > 0
    assert result.method("full").rows == 900


def test_the_page_and_the_json_hold_what_was_found(hashed) -> None:
    out, result = hashed
    page = (out / "report.html").read_text()
    assert "Learned hash functions" in page
    assert "<svg" in page
    assert all(method.name in page for method in result.methods)
    assert all(verdict.split(":")[0] in page for verdict in result.verdicts())
    saved = json.loads((out / "result.json").read_text())
    methods = saved["rows"]["methods"]
    assert [method["key"] for method in methods] == [method.key for method in result.methods]
    assert methods[0]["metrics"][0]["Recall@10"] == pytest.approx(result.methods[0].mean("Recall@10"))
    for ranking in ("rows", "bytes"):
        for method in saved[ranking]["methods"]:
            assert method["bytes"] == method["row_bytes"] + method["map_bytes"]
            assert method["serving_bytes"] == method["row_bytes"] + method["serving_map_bytes"]
    assert saved["verdicts"] == result.verdicts()


def test_every_method_has_the_same_number_of_trials_or_all_its_settings(hashed) -> None:
    _, result = hashed
    for method in result.methods:
        if method.key == "louvain":  # nothing but the sweeps
            assert (method.trials, method.settings_exist) == (2, 2)
            assert "2 (all)" in format_hash_tables(result)
        elif method.key != "full":
            assert method.trials == 4
            assert method.settings_exist > 4


def test_at_equal_bytes_a_method_pays_for_its_map_with_rows(hashed) -> None:
    _, result = hashed
    assert result.byte_budget == round(0.15 * 900) * 8 * 4
    for method in result.bytes.methods:
        if method.key == "full":
            continue
        at_rows = result.rows.method(method.key)
        assert method.bytes <= result.byte_budget
        if at_rows.map_bytes == 0:  # a formula
            assert method.rows == at_rows.rows
            assert method.metrics == at_rows.metrics
        else:
            assert method.rows < round(0.15 * 900)
    learned = result.bytes.method("learned")
    assert learned.bytes > 0.9 * result.byte_budget
    assert learned.serving_bytes == learned.row_bytes + 4 * 900  # a row number of 4 bytes for each id
    # learned-2 at this dimension: two row numbers and two weights an id are more than the rows they save
    assert {method.key for method in result.bytes.methods} | {"learned-2"} == {m.key for m in result.rows.methods}


def test_verdicts_call_a_tie_a_tie(hashed) -> None:
    _, result = hashed
    at_rows = next(verdict for verdict in result.verdicts() if "equal rows" in verdict and "one row" in verdict)
    pair = difference(result.rows.differences, "learned", "cluster")
    assert ("level with clusters" in at_rows) == pair.level
    level = replace(result.rows, differences=tuple(replace(d, level=True) for d in result.rows.differences))
    assert "Learned, one row, is level with clusters" in replace(result, rows=level).verdicts()[0]
    assert set(level.places().values()) == {"1="}


def test_a_factorization_that_is_no_better_than_popularity_is_named(hashed) -> None:
    _, result = hashed
    assert not result.warnings
    assert result.no_signal() is None
    high = dict.fromkeys(result.metrics, 1.0)
    assert "no better than popularity" in replace(result, popularity=high).no_signal()


def test_a_method_that_cannot_use_the_budget_is_excluded_and_named(tmp_path: Path) -> None:
    config = hash_config(
        tmp_path / "small", methods=("quotient-remainder", "modulo"), rows=20, trials=2, user_shares=(0.5,)
    )
    result = compare_hash(config)
    assert [method.key for method in result.methods] == ["full", "modulo"]
    assert "Quotient-remainder was not run" in result.warnings[0]
    with pytest.raises(InputError, match="no method can use"):
        compare_hash(hash_config(tmp_path / "none", methods=("quotient-remainder",), rows=20))
    assert not (tmp_path / "none").exists()


def test_the_same_seeds_give_the_same_table(hashed, tmp_path: Path) -> None:
    _, result = hashed
    again = compare_hash(
        hash_config(tmp_path / "again", methods=("modulo", "learned-2"), metrics=("UncappedRecall", "HR"))
    )
    assert again.metrics[:2] == ("UncappedRecall@10", "HR@10")
    assert "UncappedRecall@10" in (tmp_path / "again" / "report.html").read_text()
    for key in ("full", "modulo", "learned-2"):
        assert again.method(key).metrics == result.method(key).metrics


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"methods": ("magic",)}, "methods: 'magic', expected some of modulo"),
        ({"rows": 1000}, "a budget of 1000, expected 2 to 900"),
        ({"seeds": ()}, "seeds and sweeps"),
        ({"trials": 0}, "trials is 0"),
        ({"share": 1.5}, "share: 1.5"),
        ({"metric": "Recall@20"}, "metric: 'Recall@20', expected one of"),
        ({"metrics": ("HR", "HR")}, "metrics: HR HR, expected some of HR, NDCG, Recall, UncappedRecall, each once"),
        ({"metrics": (), "backbone": "lightgcn"}, "metrics: none, expected"),
        ({"metrics": ("HR",), "backbone": "dlrm"}, "backbone dlrm reports AUC, LogLoss, NE"),
        ({"evaluation": EvaluationConfig(protocol="sampled")}, "protocol: 'sampled', expected full"),
        ({"data": "nowhere"}, "nowhere"),
    ],
)
def test_what_cannot_be_compared_is_one_error(tmp_path: Path, more: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        compare_hash(hash_config(tmp_path / "out", **more))
    assert not any(tmp_path.iterdir())
