"""Results of hashing methods: rankings, warnings, tables."""

from dataclasses import replace

import pytest

from recpress.trainer.compare.hash_result import HashMethodResult, HashResult, Ranking, format_hash_tables, hash_report
from recpress.trainer.compare.ties import Difference


def method(key, recall, rows=10, map_bytes=0, **more):
    return HashMethodResult(
        key=key, name=key.title(), description="What it does.", setting={}, metrics=({"Recall@10": recall},), rows=rows,
        row_bytes=32 * rows, map_bytes=map_bytes, serving_map_bytes=2 * map_bytes, **more,
    )  # fmt: skip


def result(**more):
    methods = (method("full", 0.4, 100), method("modulo", 0.1), method("learned-2", 0.3, map_bytes=50))
    pair = Difference(first="modulo", second="learned-2", mean=-0.2, noise=0.01, p=0.002, level=False)
    full = replace(pair, first="full", mean=0.004, p=0.3, level=True)
    ranking = Ranking(methods=methods, differences=(pair, full))
    return HashResult(
        title="T", rows=ranking, bytes=ranking, byte_budget=320, ours="learned-2", full="full", metrics=("Recall@10",),
        **more,
    )  # fmt: skip


def test_shares_of_the_full_table_and_places():
    found = result()
    assert found.of_full(found.method("learned-2")) == pytest.approx(0.75)
    assert found.rows.places() == {"learned-2": "1", "modulo": "2"}
    assert [m.key for m in found.ordered(found.rows)] == ["full", "learned-2", "modulo"]
    assert found.verdicts()[0] == "At equal rows: Learned-2 is ahead of Modulo (Recall@10 +0.2000 ± 0.0100, p 0.002)."
    assert (found.method("learned-2").bytes, found.method("learned-2").serving_bytes) == (370, 420)


def test_only_a_full_table_below_popularity_is_a_warning():
    assert result().no_signal() is None
    assert result(popularity={"Recall@10": 0.39}).no_signal() is None
    assert "no better than popularity" in result(popularity={"Recall@10": 0.4}).no_signal()


def test_tables_and_page_have_both_rankings_and_warnings(tmp_path):
    found = result(warnings=("careful",), too_large={"Modulo": "does not fit"}, popularity={"Recall@10": 0.1})
    text = format_hash_tables(found)
    for part in (
        "Equal rows",
        "Equal bytes",
        "> Learned-2",
        "75.0 % =",
        "25.0 %  ",
        "Modulo: does not fit",
        "warning: careful",
    ):
        assert part in text
    hash_report(found).write(tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    for part in ("Results at equal rows", "Results at equal bytes: 320 B", "does not fit", "careful", "<svg"):
        assert part in page
    saved = found.to_json()
    assert [m["place"] for m in saved["rows"]["methods"]] == [None, "2", "1"]
    assert [m["level_with_full"] for m in saved["rows"]["methods"]] == [False, False, True]


def test_trials_say_whether_all_settings_were_tried():
    assert method("a", 0.1).trials_in_words() == "-"
    assert method("a", 0.1, trials=3, settings_exist=3).trials_in_words() == "3 (all)"
    assert method("a", 0.1, trials=3, settings_exist=9).trials_in_words() == "3"
