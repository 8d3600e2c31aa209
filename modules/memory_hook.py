"""A hook to call after freeing much memory. A library must not change the allocator of its host process itself."""

from __future__ import annotations

from collections.abc import Callable

_hook: Callable[[], None] | None = None


def set_memory_hook(hook: Callable[[], None] | None) -> None:
    """Set what returns freed memory to the system, for a process that owns its allocator. None: nothing does."""
    global _hook
    _hook = hook


def memory_freed() -> None:
    """Call the hook, if there is one. To be called after freeing much memory."""
    if _hook is not None:
        _hook()
