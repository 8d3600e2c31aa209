"""Progress in a log file: plain lines, the remaining time, and units of several kinds."""

from __future__ import annotations

import logging
import time

import pytest

from recpress.trainer.compare.setup import quiet
from recpress.trainer.observability import progress
from recpress.trainer.observability.progress import Progress, UnitProgress


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_a_resumed_run_shows_its_step_and_the_remaining_time(
    clock: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "recpress")
    with Progress("train", "step", 100, line_seconds=0) as shown:
        shown.start_at(50)
        clock[0] += 10
        shown.update(25, "loss 0.5000")
        shown.write("epoch 1, step 75: HR@10 0.5")
    assert caplog.messages == [
        "train: 75 of 100 steps (75%), loss 0.5000, 00:10 elapsed, about 00:10 left",
        "epoch 1, step 75: HR@10 0.5",
    ]


def test_without_a_total_there_is_no_remaining_time(clock: list[float], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "recpress")
    with Progress("counting ids", "row", line_seconds=5) as shown:
        shown.update(3)
        clock[0] += 6
        shown.update(3)
    assert caplog.messages == ["counting ids: 6 rows, 00:06 elapsed"]


def test_each_stage_has_its_own_count(clock: list[float], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "recpress")
    with Progress("items", "id", line_seconds=0) as shown:
        for name, done, total in (("first", 5, 10), ("first", 10, 10), ("second", 1, 4)):
            clock[0] += 5
            shown.stage(name, done, total)
    assert [line.split(", ")[:2] for line in caplog.messages] == [
        ["items: 5 of 10 ids (50%)", "first"],
        ["items: 10 of 10 ids (100%)", "first"],
        ["items: 1 of 4 ids (25%)", "second"],
    ]


def test_a_rank_that_does_not_show_is_silent(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "recpress")
    with Progress("train", total=10, show=False, line_seconds=0) as shown:
        shown.update(5)
        shown.write("a line")
    assert not caplog.messages


def test_a_long_unit_is_not_silent(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "recpress")
    with UnitProgress("compare", {"slow": 3}, line_seconds=0.02) as shown, shown.unit("slow", "the slow one"):
        deadline = time.monotonic() + 30
        while not caplog.messages and time.monotonic() < deadline:
            time.sleep(0.01)
    assert caplog.messages[0].startswith("compare: 0 of 3 units (0%), now the slow one, 00:00 elapsed")


def test_a_comparison_silences_its_stages_but_not_itself(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "recpress")
    with UnitProgress("compare", {"slow": 3}) as shown, quiet():
        logging.getLogger("recpress.trainer.train.stage").info("of a stage")
        logging.getLogger("recpress.trainer.train.stage").warning("a warning of a stage")
        shown.say("of the comparison")
    logging.getLogger("recpress.trainer.train.stage").info("after it")
    assert caplog.messages == ["a warning of a stage", "of the comparison", "after it"]


def test_no_kind_is_estimated_by_the_pace_of_another_that_was_measured(clock: list[float]) -> None:
    shown = UnitProgress("compare", {"fast": 10, "slow": 2, "other": 1}, show=False)
    assert shown.remaining() is None
    assert "left" not in shown.line()
    for kind, seconds in (("fast", 1.0), ("fast", 3.0), ("slow", 50.0)):
        with shown.unit(kind, kind):
            clock[0] += seconds
    # 8 fast ones of 2 s, one slow one of 50 s, and one that was never measured: the mean of all, 18 s
    assert shown.remaining() == pytest.approx(8 * 2 + 50 + 18)
    assert shown.line() == "compare: 3 of 13 units (23%), 00:54 elapsed, about 01:24 left"
    with shown.unit("slow", "the last slow one"):
        clock[0] += 20
        assert shown.remaining() == pytest.approx(8 * 2 + 30 + 18)
    shown.skip("fast", 8)
    assert shown.remaining() == pytest.approx(74 / 4)


def test_a_unit_that_fails_is_not_done() -> None:
    shown = UnitProgress("compare", {"a": 2}, show=False)
    with pytest.raises(ValueError, match="no"), shown.unit("a", "one"):
        raise ValueError("no")
    assert "0 of 2 units" in shown.line()
