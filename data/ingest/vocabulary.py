"""Raw ids -> dense ids, by first appearance: stable, and extendable without renumbering.

Size: an integer id takes about 32 bytes of memory, a string id about 40 and its own length, and up to twice
that for a moment while sorted runs are merged; so 100 M ids of 10 bytes take 5 to 10 GB. `encode` raises
an error beyond its budget; it never gives two ids one number.

Arrays double their memory when they grow, so that n ids cost O(n) in any number of batches.

Lookup: the keys are in a few sorted runs of decreasing size (as in a log-structured merge tree). A batch costs a
binary search of its distinct ids in each run, and growth costs O(n log n) in all. The key of an integer is the integer;
that of a string is a 64-bit hash from random tables (Zobrist 1970), confirmed by a second, independent 64-bit hash.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from recpress.data.dataset.files import first_line
from recpress.data.errors import InputError
from recpress.data.ingest.raw_files import RowNumbers
from recpress.data.seeds import generator

Kind = Literal["int", "string"]
_CLASH = -2
_ROWS = RowNumbers()
_WIDTH = 64  # positions of a string with separate hash tables


class Vocabulary:
    """Ids of one side or of one categorical column: raw values in dense order, and how often each was
    counted."""

    def __init__(self, kind: Kind, name: str, *, budget: float = 8 * 2**30) -> None:
        self.kind = kind
        self.name = name
        self._budget = budget
        self._raw: list[pa.Array] = []  # in dense order
        self._bytes = 0  # of the raw values
        self._size = 0
        self._counts = np.zeros(0, dtype=np.int64)  # of at least _size; the rest is zero
        self._runs: list[tuple[np.ndarray, np.ndarray]] = []  # (sorted keys, dense ids)
        self._confirm = np.zeros(0, dtype=np.uint64)  # second hash of each string, in dense order; of at least _size
        self._reseed(0)

    def __len__(self) -> int:
        return self._size

    @staticmethod
    def kind_of(data: pa.DataType, where: str) -> Kind:
        """The kind that ids of an Arrow type need. Raises InputError for other types."""
        if pa.types.is_dictionary(data):
            data = data.value_type
        if pa.types.is_integer(data) or pa.types.is_null(data):
            return "int"
        if pa.types.is_string(data) or pa.types.is_large_string(data) or pa.types.is_string_view(data):
            return "string"
        raise InputError(f"{where}: type {data}; expected integers or strings")

    @classmethod
    def from_table(cls, table: pa.Table, name: str, *, budget: float = 8 * 2**30) -> Vocabulary:
        """The vocabulary that `table` wrote. Raises InputError if a raw id occurs twice."""
        raw = table.column("raw")
        vocabulary = cls(cls.kind_of(raw.type, name), name, budget=budget)
        found = vocabulary.encode(raw, count=False)
        if not np.array_equal(found, np.arange(len(raw))):
            row = int(np.argmax(found != np.arange(len(raw))))
            raise InputError(f"{name}, row {row}: the raw id {raw[row].as_py()!r} occurs twice")
        vocabulary._counts = table.column("count").to_numpy().astype(np.int64)  # `found` says it has as many
        return vocabulary

    def table(self, counts: np.ndarray | None = None) -> pa.Table:
        """Columns `raw` (int64 or string) and `count` (int64, or the given ones); row k is dense id k."""
        kind = pa.int64() if self.kind == "int" else pa.large_string()
        counts = self._counts[: self._size] if counts is None else counts
        return pa.table({"raw": pa.chunked_array(self._raw, type=kind), "count": pa.array(counts)})

    @property
    def counts(self) -> np.ndarray:
        return self._counts[: self._size]

    def fingerprint(self) -> str:
        """sha256 of the raw ids in their order (not of the counts)."""
        return _fingerprint(self._raw, self.kind)

    def encode(
        self,
        values: pa.Array | pa.ChunkedArray,
        *,
        grow: bool = True,
        count: bool = True,
        where: str = "",
        rows: RowNumbers = _ROWS,
    ) -> np.ndarray:
        """Dense ids of raw ids, int64 of the same length; ids that are new get the next numbers.

        Args:
            grow: number new ids; otherwise they are -1, and nothing is counted.
            count: add the occurrences to the counts.
            where: file and column, for errors.
            rows: the rows that the values are from, for errors.

        Raises:
            InputError: a null; a value that is not an integer, in a vocabulary of integers; the budget is exceeded.
        """
        values = self._cast(values, where, rows)
        encoded = pc.dictionary_encode(values)
        if isinstance(encoded, pa.ChunkedArray):
            encoded = encoded.combine_chunks()
        if isinstance(encoded, pa.ChunkedArray):  # without chunks
            return np.empty(0, dtype=np.int64)
        places = encoded.indices.to_numpy(zero_copy_only=False)
        if not grow:
            return np.maximum(self._find(*self._keys(encoded.dictionary)), -1)[places]
        distinct = self._number(encoded.dictionary)
        self._counts = grown(self._counts, self._size)
        if count:
            self._counts[distinct] += np.bincount(places, minlength=len(distinct))
        return distinct[places]

    def find(self, values: pa.Array) -> np.ndarray:
        """Dense ids of raw ids as text or integers, -1 where they have none; whatever the kind, `7` and 7 are equal."""
        if self.kind == "int" and not pa.types.is_integer(values.type):
            good = pc.match_substring_regex(values, "^(0|-?[1-9][0-9]{0,17})$")
            values = pc.if_else(good, values, None).cast(pa.int64())
        known = pc.is_valid(values).to_numpy(zero_copy_only=False)
        found = np.full(len(values), -1, dtype=np.int64)
        found[known] = self.encode(values.drop_null(), grow=False)
        return found

    def fit(self, values: pa.Array, *, where: str = "", rows: RowNumbers = _ROWS) -> pa.Array:
        """The values in the type of this vocabulary, which `encode` does not convert. Raises InputError like it."""
        return self._cast(values, where, rows)

    def become_strings(self) -> None:
        """Turns integers into their decimal digits; dense ids and counts stay."""
        self._raw = [chunk.cast(pa.large_string()) for chunk in self._raw]
        self._bytes = sum(chunk.get_total_buffer_size() for chunk in self._raw)
        self.kind = "string"
        self._reseed(0)

    def rows_of(self, raw: Sequence[str]) -> list[dict[str, Any]]:
        """The rows of `table` that have these raw ids."""
        found = self.encode(pa.array(raw, pa.large_string()), grow=False)
        return [
            {"raw": text, "count": int(self._counts[dense])}
            for text, dense in zip(raw, found, strict=True)
            if dense >= 0
        ]

    def matching(self, pattern: str) -> tuple[int, str]:
        """(number of raw ids of text that match a regular expression, the first of them)."""
        count, first = 0, ""
        for chunk in self._raw:
            found = pc.match_substring_regex(chunk, pattern)
            here = pc.sum(found).as_py() or 0
            if here and not count:
                first = chunk[pc.index(found, True).as_py()].as_py()
            count += here
        return count, first

    def _cast(self, values: pa.Array | pa.ChunkedArray, where: str, rows: RowNumbers) -> pa.Array:
        if pa.types.is_dictionary(values.type):
            values = values.cast(values.type.value_type)
        if values.null_count:
            row = int(np.argmax(pc.is_null(values).to_numpy(zero_copy_only=False)))
            raise InputError(f"{where}, {rows.name(row)}: no {self.name} id")
        kind = pa.int64() if self.kind == "int" else pa.large_string()
        try:
            return values.cast(kind)
        except pa.ArrowInvalid as error:
            message = first_line(error)
            if pa.types.is_string(values.type) or pa.types.is_large_string(values.type):
                good = pc.match_substring_regex(values, "^-?[0-9]{1,18}$").to_numpy(zero_copy_only=False)
                row = int(np.argmin(good))
                where, message = (
                    f"{where}, {rows.name(row)}",
                    f"{values[row].as_py()!r}; expected an integer",
                )
            raise InputError(f"{where}: {self.name} id {message}") from error

    def _number(self, raw: pa.Array) -> np.ndarray:
        """Dense ids of distinct raw ids; the new ones in their order."""
        keys, confirm = self._keys(raw)
        ids = self._find(keys, confirm)
        while self.kind == "string" and ((ids == _CLASH).any() or _repeats(keys[ids < 0])):
            self._reseed(self._seed + 1)  # two strings share a key: use other tables
            keys, confirm = self._keys(raw)
            ids = self._find(keys, confirm)
        new = np.flatnonzero(ids < 0)
        if new.size:
            ids[new] = np.arange(self._size, self._size + new.size)
            fresh = raw.take(pa.array(new))
            self._room(fresh)
            self._raw.append(fresh)
            if self.kind == "string":
                self._confirm = grown(self._confirm, self._size + new.size)
                self._confirm[self._size : self._size + new.size] = confirm[new]
            self._size += new.size
            self._add_run(keys[new], ids[new])
        return ids

    def _room(self, fresh: pa.Array) -> None:
        self._bytes += fresh.get_total_buffer_size()
        each = 24 if self.kind == "int" else 32
        if self._bytes + each * (self._size + len(fresh)) > self._budget:
            raise InputError(
                f"vocabulary of {self.name}: over {self._size} ids need more than the limit of "
                f"{self._budget / 2**30:.1f} GiB (--memory-gib)"
            )

    def _add_run(self, keys: np.ndarray, ids: np.ndarray) -> None:
        order = np.argsort(keys)
        self._runs.append((keys[order], ids[order]))
        while len(self._runs) > 1 and len(self._runs[-2][0]) <= 2 * len(self._runs[-1][0]):
            (keys_a, ids_a), (keys_b, ids_b) = self._runs[-2:]
            keys = np.concatenate((keys_a, keys_b))
            order = np.argsort(keys, kind="stable")  # timsort: merges two sorted runs in one pass
            self._runs[-2:] = [(keys[order], np.concatenate((ids_a, ids_b))[order])]

    def _find(self, keys: np.ndarray, confirm: np.ndarray) -> np.ndarray:
        """Dense ids, -1 where a key is unknown, _CLASH if it is known as that of another string."""
        ids = np.full(len(keys), -1, dtype=np.int64)
        for run, dense in self._runs:
            place = np.minimum(np.searchsorted(run, keys), len(run) - 1)
            hit = run[place] == keys
            ids[hit] = dense[place[hit]]
        if self.kind == "string" and self._size:
            ids[(ids >= 0) & (self._confirm[ids] != confirm)] = _CLASH
        return ids

    def _keys(self, raw: pa.Array) -> tuple[np.ndarray, np.ndarray]:
        if self.kind == "int":
            return raw.to_numpy(zero_copy_only=False), np.empty(0, dtype=np.uint64)
        return _hash(raw, self._tables[0]), _hash(raw, self._tables[1])

    def _reseed(self, seed: int) -> None:
        """Draw other hash tables, and compute all keys again."""
        self._seed = seed
        if self.kind == "int":
            return
        rng = generator("vocabulary", seed)
        self._tables = rng.integers(0, 2**64, (2, _WIDTH, 256), dtype=np.uint64)
        self._runs, start = [], 0
        confirm = [np.zeros(0, dtype=np.uint64)]
        for chunk in self._raw:
            keys, second = self._keys(chunk)
            self._add_run(keys, np.arange(start, start + len(chunk)))
            confirm.append(second)
            start += len(chunk)
        self._confirm = np.concatenate(confirm)


def raw_fingerprint(raw: pa.ChunkedArray) -> str:
    """`Vocabulary.fingerprint` of the vocabulary with these raw ids, integers or strings in dense order."""
    kind = Vocabulary.kind_of(raw.type, "raw ids")
    return _fingerprint(raw.cast(pa.int64() if kind == "int" else pa.large_string()).chunks, kind)


def _fingerprint(chunks: Sequence[pa.Array], kind: Kind) -> str:
    lengths = hashlib.sha256(f"{kind} {sum(map(len, chunks))}".encode())
    values = hashlib.sha256()  # separate, so that the fingerprint does not depend on the chunks
    for chunk in chunks:
        if kind == "int":
            values.update(chunk.to_numpy().astype("<i8").tobytes())
        else:
            lengths.update(pc.binary_length(chunk).to_numpy().astype("<i8").tobytes())
            values.update(_characters(chunk))
    return hashlib.sha256(lengths.digest() + values.digest()).hexdigest()[:32]


def grown(array: np.ndarray, size: int) -> np.ndarray:
    """The array; if it is shorter than `size`, a copy of at least twice its length, filled with zeros."""
    if len(array) >= size:
        return array
    grown = np.zeros(max(size, 2 * len(array)), dtype=array.dtype)
    grown[: len(array)] = array
    return grown


def _repeats(keys: np.ndarray) -> bool:
    keys = np.sort(keys)
    return bool((keys[1:] == keys[:-1]).any())


def _characters(strings: pa.Array) -> bytes:
    """The bytes of a large_string array."""
    offsets = np.frombuffer(strings.buffers()[1], dtype=np.int64)[strings.offset :][: len(strings) + 1]
    data = strings.buffers()[2]
    return data.slice(offsets[0], offsets[-1] - offsets[0]).to_pybytes() if data is not None and len(strings) else b""


def _hash(strings: pa.Array, tables: np.ndarray) -> np.ndarray:
    """(n,) uint64: the sum, mod 2^64, of a random number for each (place, byte), and of one for the length.

    Beyond `_WIDTH` positions the numbers are multiplied by powers of an odd constant.
    """
    lengths = pc.binary_length(strings).to_numpy(zero_copy_only=False).astype(np.int64)
    data = np.frombuffer(_characters(strings), dtype=np.uint8)
    starts = np.cumsum(lengths) - lengths
    place = np.arange(len(data)) - np.repeat(starts, lengths)
    values = tables[place % _WIDTH, data]
    long = place >= _WIDTH
    if long.any():
        values[long] *= np.power(np.uint64(0x9E3779B97F4A7C15), (place[long] // _WIDTH).astype(np.uint64))
    total = np.concatenate((np.zeros(1, dtype=np.uint64), np.cumsum(values, dtype=np.uint64)))
    with np.errstate(over="ignore"):
        return total[starts + lengths] - total[starts] + lengths.astype(np.uint64) * tables[0, 0]
