"""Raw ids of any type -> ids in [0, size), while they are read: no vocabulary, and no pass over the log before.

The 64-bit hash is that of splitmix64 (Steele, Lea and Flood 2014) for integers; for text and bytes the same mix of one
word of eight bytes after another, beginning with the length. It is the same on every machine, in every release. The
upper 32 bits choose the id, as size * bits / 2 ** 32 (Lemire 2019), which is faster than a remainder.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa

_BLOCK = 1 << 14  # rows that stay in the processor's cache from one operation to the next
_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_FIRST, _SECOND = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_MASKS = np.array([(1 << 8 * count) - 1 for count in range(9)], dtype=np.uint64)
"""Of the first bytes of a little-endian word."""


def raw_kind(kind: pa.DataType) -> str | None:
    """`integers` or `text`, also in a dictionary: types of one kind have the same hash. None: cannot be hashed."""
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if pa.types.is_integer(kind):
        return "integers"
    text = (
        pa.types.is_string, pa.types.is_large_string, pa.types.is_binary, pa.types.is_large_binary,
        pa.types.is_fixed_size_binary,
    )  # fmt: skip
    return "text" if any(test(kind) for test in text) else None


def hash_ids(array: pa.Array, size: int) -> np.ndarray:
    """Ids (rows,) int64 in [0, size) of raw ids without nulls, of a type that has a `raw_kind`.

    Equal ids have equal positions in all columns, whatever their width or dictionary: -1 of int8 is -1 of int64, text
    is its UTF-8 bytes. Unequal ids may share one.

    Example:
        >>> hash_ids(pa.array(["a", "b", "a"]), 1000).tolist()
        [367, 212, 367]
    """
    if pa.types.is_dictionary(array.type):
        distinct = hash_ids(array.dictionary, size)
        return distinct[array.indices.to_numpy(zero_copy_only=False)]
    if pa.types.is_integer(array.type):
        return _places(array.to_numpy(zero_copy_only=False), size)
    return _places(_words(array), size, mixed=True)


def shared_ids(counts: np.ndarray) -> tuple[int, float]:
    """(number of raw ids, share of them that share a position), estimated from how often each position occurs.

    Linear counting (Whang, Vander-Zanden and Taylor 1990): of n raw ids in m positions, m exp(-n / m) positions stay
    empty. Where all are taken, the number is a lower bound.

    Args:
        counts: how often each position occurs, (size,).
    """
    size, used = len(counts), int(np.count_nonzero(counts))
    load = -np.log(max(size - used, 0.5) / size)
    distinct = max(used, round(size * load))
    return distinct, float(1 - np.exp(-distinct / size))


def _places(words: np.ndarray, size: int, *, mixed: bool = False) -> np.ndarray:
    placed = np.empty(len(words), dtype=np.int64)
    spare = np.empty(min(_BLOCK, len(words)), dtype=np.uint64)
    for first in range(0, len(words), _BLOCK):
        block = placed[first : first + _BLOCK].view(np.uint64)
        part = words[first : first + _BLOCK]
        block[:] = part if part.dtype == np.uint64 else part.astype(np.int64, copy=False).view(np.uint64)
        if not mixed:
            _mix(block, spare[: len(block)])
        block >>= np.uint64(32)
        block *= np.uint64(size)
        block >>= np.uint64(32)
    return placed


def _mix(words: np.ndarray, spare: np.ndarray) -> None:
    """splitmix64 of each word, in place."""
    words += _GAMMA
    for shift, factor in ((30, _FIRST), (27, _SECOND)):
        np.right_shift(words, np.uint64(shift), out=spare)
        words ^= spare
        words *= factor
    np.right_shift(words, np.uint64(31), out=spare)
    words ^= spare


def _words(array: pa.Array) -> np.ndarray:
    """64-bit hashes of text and bytes, (rows,) uint64."""
    if pa.types.is_fixed_size_binary(array.type):
        array = array.cast(pa.binary())
    large = pa.types.is_large_string(array.type) or pa.types.is_large_binary(array.type)
    _, offset_buffer, data = array.buffers()
    offsets = np.frombuffer(offset_buffer, dtype=np.int64 if large else np.int32) if offset_buffer else np.zeros(1)
    offsets = offsets[array.offset : array.offset + len(array) + 1].astype(np.int64)
    if not len(array):
        return np.empty(0, dtype=np.uint64)
    begin, end = int(offsets[0]), int(offsets[-1])
    held = np.zeros(end - begin + 8, dtype=np.uint8)  # eight more, so that the last word can be read
    if end > begin:
        held[:-8] = np.frombuffer(data, dtype=np.uint8)[begin:end]
    every = np.ndarray((len(held) - 7,), dtype="<u8", buffer=held, strides=(1,))  # the word from each byte on
    starts, lengths = offsets[:-1] - begin, np.diff(offsets)
    hashes = lengths.astype(np.uint64)
    for first in range(0, len(hashes), _BLOCK):
        block, start, length = (part[first : first + _BLOCK] for part in (hashes, starts, lengths))
        _mix(block, np.empty_like(block))
        longest = int(length.max())
        for place in range(0, longest, 8):
            rows = slice(None) if int(length.min()) > place else np.flatnonzero(length > place)
            left = np.minimum(length[rows] - place, 8)
            mixed = block[rows] ^ (every[start[rows] + place] & _MASKS[left])
            _mix(mixed, np.empty_like(mixed))
            block[rows] = mixed
    return hashes
