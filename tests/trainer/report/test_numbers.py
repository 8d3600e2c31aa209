"""Numbers as text."""

import math

import pytest

from recpress.trainer.report.numbers import finite, format_bytes, format_metric, format_seconds, share


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "-"),
        (0.414, "0.41 s"),
        (9.94, "9.9 s"),
        (9.96, "10 s"),
        (599, "599 s"),
        (600, "10.0 min"),
        (7200, "2.0 h"),
    ],
)
def test_seconds(seconds, text):
    assert format_seconds(seconds) == text


def test_metrics_bytes_and_shares():
    assert format_metric(0.72014, 0.00123) == "0.7201 ± 0.0012"
    assert format_metric(0.5, math.nan) == "0.5000"
    assert format_metric(math.nan, math.nan) == "-"
    assert [format_bytes(size) for size in (None, 12, 3_456, 3_500_000, 2e9)] == [
        "-",
        "12 B",
        "3.46 kB",
        "3.5 MB",
        "2 GB",
    ]
    assert (share(1, 8), share(1, 0)) == ("12.5 %", "-")


def test_what_json_does_not_know_becomes_null_or_text():
    assert finite({"a": (1.0, math.inf), "b": {"c": math.nan}, 3: complex(1)}) == {
        "a": [1.0, None],
        "b": {"c": None},
        "3": "(1+0j)",
    }
