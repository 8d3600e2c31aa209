"""Atomic writes of single local files."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yield a temporary name in the folder of `path`. Its file becomes `path` when the block ends, and is removed when
    the block raises: a reader of `path` sees the old file or the new one, never a part.

    Example:
        >>> with replacing("settings.toml") as temporary:
        ...     _ = temporary.write_text("epochs = 3")
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.part")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
