"""A hook that is called where much memory was just freed: a library leaves its host process's allocator alone."""

from __future__ import annotations

from collections.abc import Callable

_hook: Callable[[], None] | None = None


def on_freed(hook: Callable[[], None] | None) -> None:
    """Let a process that is all ours, such as a `recpress` command, hand freed memory back by `hook`; None: nothing."""
    global _hook
    _hook = hook


def freed() -> None:
    """Much memory was just freed. Does nothing but what `on_freed` was given."""
    if _hook is not None:
        _hook()
