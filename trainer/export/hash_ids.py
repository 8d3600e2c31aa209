"""Raw ids -> dense ids, of the columns that a log hashes while it is read. It needs numpy, and nothing of recpress.

    from hash_ids import hash_of

    items = hash_of("path/of/this/folder", "item_id")
    ids = items(["a7", "b9"])  # (2,) int64, for torch.from_numpy

The hash is splitmix64 of an integer; of text and bytes, the same mix of its length and of each word of eight bytes. The
upper 32 bits choose the id: size * bits / 2 ** 32.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

_MASK = (1 << 64) - 1


def hash_of(folder: str | Path, column: str) -> Callable[[Sequence[Any] | np.ndarray], np.ndarray]:
    """The hash of a column of the model in `folder`: a function from raw ids to (n,) int64.

    Raises ValueError for a column that is not hashed and, when called, for ids of another kind than the log has.
    """
    known = json.loads((Path(folder) / "manifest.json").read_text())["hashed"]
    if column not in known:
        raise ValueError(f"{folder}: column {column!r} is not hashed; hashed are: {', '.join(known) or 'none'}")
    kind, size = known[column]["kind"], known[column]["ids"]

    def hashed(values: Sequence[Any] | np.ndarray) -> np.ndarray:
        found = kind_of(values)
        if len(values) and found != kind:
            raise ValueError(f"column {column!r}: {found}, but the log has {kind}; their hashes differ")
        return hash_ids(values, size)

    return hashed


def kind_of(values: Sequence[Any] | np.ndarray) -> str:
    """`integers` or `text`, of which bytes are a part. Raises ValueError for other values, and for both."""
    if isinstance(values, np.ndarray) and values.dtype.kind in "iu":
        return "integers"
    is_text = [isinstance(value, (str, bytes)) for value in values]
    for value, text in zip(values, is_text, strict=True):
        if not text and (isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, np.integer))):
            raise ValueError(f"{value!r} ({type(value).__name__}); expected an integer, text or bytes")
    if any(is_text) and not all(is_text):
        raise ValueError("integers and text; expected one kind")
    return "text" if any(is_text) else "integers"


def hash_ids(values: Sequence[Any] | np.ndarray, size: int) -> np.ndarray:
    """(n,) int64 in [0, size) of integers from -2 ** 63 to 2 ** 64 - 1, or of text (as UTF-8) or bytes."""
    if kind_of(values) == "text":
        words = _words([value.encode() if isinstance(value, str) else bytes(value) for value in values])
    elif isinstance(values, np.ndarray):
        words = _mixed(values.astype(np.uint64))
    else:
        if odd := [value for value in values if not -(2**63) <= int(value) < 2**64]:
            raise ValueError(f"{odd[0]}: exceeds 64 bits")
        words = _mixed(np.array([int(value) & _MASK for value in values], dtype=np.uint64))
    return ((words >> np.uint64(32)) * np.uint64(size) >> np.uint64(32)).astype(np.int64)


def _mixed(words: np.ndarray) -> np.ndarray:
    """splitmix64 of each word (n,) uint64."""
    words = words + np.uint64(0x9E3779B97F4A7C15)
    words = (words ^ words >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ words >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return words ^ words >> np.uint64(31)


def _words(values: Sequence[bytes]) -> np.ndarray:
    """64-bit hashes of bytes, (n,) uint64."""
    lengths = np.array([len(value) for value in values], dtype=np.int64)
    counts = -(-lengths // 8)
    starts = np.cumsum(counts) - counts
    padded = b"".join(value + bytes(-len(value) % 8) for value in values)
    every = np.frombuffer(padded, dtype="<u8")
    hashes = _mixed(lengths.astype(np.uint64))
    for place in range(int(counts.max(initial=0))):
        rows = np.flatnonzero(counts > place)
        hashes[rows] = _mixed(hashes[rows] ^ every[starts[rows] + place])
    return hashes
