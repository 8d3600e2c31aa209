"""Differences of `compare both` against noise."""

from __future__ import annotations

from recpress.trainer.compare.both_result import BothResult, Point, format_both_table


def test_a_difference_within_the_noise_of_the_seeds_is_marked() -> None:
    def point(level: float, *values: float) -> Point:
        return Point(
            level=level, form="", rate=0.0, rows=1, bytes=1, serving_bytes=1, rows_read=0, error=0.0,
            metrics={"HR@10": values},
        )  # fmt: skip

    points = point(1.0, 0.70, 0.72), point(0.5, 0.69, 0.725), point(0.25, 0.60, 0.62)
    result = BothResult(title="", points=points, metrics=("HR@10",), full_bytes=1, total_rows=1)
    assert [result.tied(p, "HR@10") for p in points] == [False, True, False]
    zero = BothResult(title="", points=(point(1.0, 0.0),), metrics=("HR@10",), full_bytes=1, total_rows=1)
    assert not zero.tied(zero.points[0], "HR@10")
    assert "nan" in format_both_table(zero)
