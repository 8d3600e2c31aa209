"""The hook that is called after freeing much memory."""

from __future__ import annotations

import ctypes

import pytest

from recpress.modules import memory_hook


def test_freed_memory_is_told_to_who_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    def trimmed(*_: object) -> None:
        raise AssertionError("no library calls the allocator")

    monkeypatch.setattr(ctypes, "CDLL", trimmed)
    monkeypatch.setattr(memory_hook, "_hook", None)
    memory_hook.memory_freed()
    told: list[int] = []
    memory_hook.set_memory_hook(lambda: told.append(1))
    memory_hook.memory_freed()
    memory_hook.set_memory_hook(None)
    memory_hook.memory_freed()
    assert told == [1]
