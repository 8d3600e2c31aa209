"""The progress of a comparison: lines where there is no terminal, and the remaining time."""

from __future__ import annotations

import io
import threading

import pytest

from recpress.trainer.compare import progress
from recpress.trainer.compare.progress import UnitProgress


class Lines(io.StringIO):
    """A log file that tells when it has a line."""

    def __init__(self) -> None:
        super().__init__()
        self.written = threading.Event()

    def write(self, text: str) -> int:
        done = super().write(text)
        self.written.set()
        return done


def test_a_long_unit_is_not_silent() -> None:
    lines = Lines()
    with (
        UnitProgress("compare", {"slow": 3}, stream=lines, line_seconds=0.02) as shown,
        shown.unit("slow", "the slow one"),
    ):
        assert lines.written.wait(30)
    assert "compare: 0 of 3 done" in lines.getvalue()
    assert "elapsed" in lines.getvalue()
    assert "now the slow one" in lines.getvalue()


def test_no_kind_is_estimated_by_the_pace_of_another_that_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    shown = UnitProgress("compare", {"fast": 10, "slow": 2, "other": 1}, shown=False)
    assert shown.remaining() is None
    assert "left" not in shown.line()
    for kind, seconds in (("fast", 1.0), ("fast", 3.0), ("slow", 50.0)):
        with shown.unit(kind, kind):
            clock[0] += seconds
    # 8 fast ones of 2 s, one slow one of 50 s, and one that was never measured: the mean of all, 18 s
    assert shown.remaining() == pytest.approx(8 * 2 + 50 + 18)
    assert "3 of 13 done, 00:54 elapsed, about 01:24 left" in shown.line()
    with shown.unit("slow", "the last slow one"):
        clock[0] += 20
        assert shown.remaining() == pytest.approx(8 * 2 + 30 + 18)
    shown.skip("fast", 8)
    assert shown.remaining() == pytest.approx(74 / 4)


def test_a_unit_that_fails_is_not_done() -> None:
    shown = UnitProgress("compare", {"a": 2}, shown=False)
    with pytest.raises(ValueError, match="no"), shown.unit("a", "one"):
        raise ValueError("no")
    assert "0 of 2 done" in shown.line()
