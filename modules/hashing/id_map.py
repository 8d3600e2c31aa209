"""A map from the ids of one table to fewer rows: the output of every hashing method, and its look-up."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch

from recpress.modules.id_check import host_reads

Unknown = Literal["hash", "error"]
"""What to do with an id that a map does not cover: use the rows of `IdMap.hashed`, or raise an error."""


class Lookup(NamedTuple):
    """The rows of n ids."""

    rows: torch.Tensor
    """(n, rows_per_id), of the dtype of the ids."""
    weights: torch.Tensor | None
    """(n, rows_per_id) float32; None if the map has none."""
    unknown: torch.Tensor | None
    """Which ids the map does not cover, (n,) bool; None if it is known that it covers all of them."""


@dataclass(frozen=True, eq=False, kw_only=True)
class IdMap:
    """Id -> one or two rows of a table with `num_rows` rows. The vector of an id is the (weighted) sum of its rows.

    Args:
        rows: (num_ids, rows_per_id) int32, each in [0, num_rows). rows_per_id is 2 for double hashing and similar
            methods, else 1. May be a view of a memory map.
        num_rows: rows of the table.
        weights: (num_ids, rows_per_id) float16 or float32, or None for ones.
        method: name of the method that made the map.
        vocabulary: fingerprint of the ids, or None.
        computed: the rows follow from the id by a formula, so that serving needs no map (`nbytes` is 0).
        seed: of the hash for ids that the map does not cover (`hashed`).

    Raises:
        ValueError: shapes do not fit; a row is outside the table. The error names the id.

    Example:
        >>> id_map = IdMap(rows=torch.tensor([[0], [1], [0]], dtype=torch.int32), num_rows=2)
        >>> id_map.look_up(torch.tensor([2, 1])).rows[:, 0]
        tensor([0, 1])
    """

    rows: torch.Tensor
    num_rows: int
    weights: torch.Tensor | None = None
    method: str = ""
    vocabulary: str | None = None
    computed: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.rows.ndim != 2 or self.rows.dtype != torch.int32:
            raise ValueError(
                f"id map: rows are {self.rows.dtype} {tuple(self.rows.shape)}, expected int32 (ids, rows_per_id)"
            )
        if self.weights is not None and self.weights.shape != self.rows.shape:
            raise ValueError(
                f"id map: weights are {tuple(self.weights.shape)}, expected the shape of rows, {tuple(self.rows.shape)}"
            )
        if self.num_rows < 1:
            raise ValueError(f"id map: a table of {self.num_rows} rows, expected at least 1")
        for first in range(0, len(self.rows), 1 << 24):
            part = self.rows[first : first + (1 << 24)]
            low, high = int(part.min()), int(part.max())
            if low < 0 or high >= self.num_rows:
                bad = int(((part < 0) | (part >= self.num_rows)).any(1).nonzero()[0])
                raise ValueError(
                    f"id map: id {first + bad} has row {part[bad].tolist()}, expected 0 to {self.num_rows - 1}"
                )

    def __repr__(self) -> str:
        weights = "" if self.weights is None else ", weighted"
        return (
            f"IdMap(num_ids={self.num_ids}, num_rows={self.num_rows}, rows_per_id={self.rows_per_id}{weights}, "
            f"method={self.method!r})"
        )

    @property
    def num_ids(self) -> int:
        """Ids that the map covers: 0 to num_ids - 1."""
        return self.rows.shape[0]

    @property
    def rows_per_id(self) -> int:
        """Rows per id."""
        return self.rows.shape[1]

    @property
    def bits(self) -> int:
        """Bits of one row number when packed."""
        return max(1, (self.num_rows - 1).bit_length())

    @property
    def nbytes(self) -> int:
        """Bytes of the bit-packed map and its weights; 0 if the map is computed."""
        if self.computed:
            return 0
        weights = 0 if self.weights is None else self.weights.nbytes
        return -(-self.num_ids * self.rows_per_id * self.bits // 8) + weights

    def hashed(self, ids: torch.Tensor) -> torch.Tensor:
        """Rows of ids that the map does not cover: (n,) int64 of any value -> (n, rows_per_id) int32."""
        return universal_hash(ids, self.num_rows, self.seed, self.rows_per_id)

    def look_up(self, ids: torch.Tensor, rows: torch.Tensor | None = None) -> Lookup:
        """Rows and weights of ids (n,) int32 or int64. An id that the map does not cover is hashed, with weights of 1.

        Modules that apply maps use this, except `LearnedHash`, which looks up all features of a batch in one kernel.

        Args:
            rows: `self.rows` on the device of the ids. On CUDA nothing is read from the device: `unknown` is a mask.
        """
        unknown, known = None, ids
        if not host_reads(ids) or _has_unknown(ids, self.num_ids):
            unknown = (ids < 0) | (ids >= self.num_ids)
            known = ids.masked_fill(unknown, 0)

        def gather(table: torch.Tensor) -> torch.Tensor:
            columns = [table[:, column].index_select(0, known) for column in range(self.rows_per_id)]
            return columns[0][:, None] if len(columns) == 1 else torch.stack(columns, 1)

        found = gather(self.rows if rows is None else rows).to(ids.dtype)
        weights = None if self.weights is None else gather(self.weights).float()
        if unknown is not None:
            found = torch.where(unknown[:, None], self.hashed(ids).to(ids.dtype), found)
            weights = None if weights is None else weights.masked_fill(unknown[:, None], 1.0)
        return Lookup(found, weights, unknown)

    def save(self, folder: str | Path) -> None:
        """Write `rows.npy` (and `weights.npy`) and then `map.json` into an existing folder."""
        folder = Path(folder)
        np.save(folder / "rows.npy", self.rows.numpy(), allow_pickle=False)
        if self.weights is not None:
            np.save(folder / "weights.npy", self.weights.numpy(), allow_pickle=False)
        meta = {
            "num_rows": self.num_rows,
            "method": self.method,
            "vocabulary": self.vocabulary,
            "computed": self.computed,
            "seed": self.seed,
            "weighted": self.weights is not None,
        }
        (folder / "map.json").write_text(json.dumps(meta, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path, *, vocabulary: str | None = None) -> IdMap:
        """Read what `save` wrote; rows and weights are memory maps.

        Args:
            vocabulary: expected fingerprint of the ids; None accepts any.

        Raises:
            ValueError: a file is missing or corrupt; the map is for another vocabulary.
        """
        folder = Path(folder)
        try:
            meta = json.loads((folder / "map.json").read_text(encoding="utf-8"))
            rows = np.load(folder / "rows.npy", mmap_mode="c", allow_pickle=False)
            weights = np.load(folder / "weights.npy", mmap_mode="c", allow_pickle=False) if meta["weighted"] else None
            found = cls(
                rows=torch.from_numpy(rows),
                num_rows=meta["num_rows"],
                weights=None if weights is None else torch.from_numpy(weights),
                method=meta["method"],
                vocabulary=meta["vocabulary"],
                computed=meta["computed"],
                seed=meta["seed"],
            )
        except (OSError, ValueError, EOFError, KeyError, TypeError) as error:
            raise ValueError(f"{folder}: incomplete or corrupt id map: {error}") from error
        if vocabulary is not None and found.vocabulary != vocabulary:
            raise ValueError(
                f"{folder}: the map is for vocabulary {found.vocabulary}, expected {vocabulary}: equal ids mean "
                "different values"
            )
        return found


def universal_hash(ids: torch.Tensor, num_rows: int, seed: int, rows_per_id: int = 1) -> torch.Tensor:
    """Rows in [0, num_rows) of ids of any value: (n,) int64 -> (n, rows_per_id) int32.

    Adds an offset drawn from (seed, column), applies the finalizer of MurmurHash3 (Appleby), a bijection of 64 bits,
    and takes the remainder. It spreads ids but does not resist an adversary.
    """
    columns = [mixed(ids.long() + hash_offset(seed, column)).remainder(num_rows) for column in range(rows_per_id)]
    return torch.stack(columns, 1).to(torch.int32)


def hash_offset(seed: int, column: int) -> int:
    """The int64 to add to an id before `mixed`."""
    drawn = int(np.random.Philox(key=[seed % 2**64, column]).random_raw())
    return drawn - (1 << 64) if drawn >= 1 << 63 else drawn


def mixed(x: torch.Tensor) -> torch.Tensor:
    """The finalizer of MurmurHash3 of int64, without the lowest bit: int64 from 0. TorchScript compiles it.

    The masks make shifts logical: torch shifts the sign in.
    """
    x = (x ^ ((x >> 33) & 0x7FFFFFFF)) * -49064778989728563  # 0xFF51AFD7ED558CCD as int64
    x = (x ^ ((x >> 33) & 0x7FFFFFFF)) * -4265267296055464877  # 0xC4CEB9FE1A85EC53
    x = x ^ ((x >> 33) & 0x7FFFFFFF)
    return (x >> 1) & 0x7FFFFFFFFFFFFFFF


def _has_unknown(ids: torch.Tensor, num_ids: int) -> bool:
    if not len(ids):
        return False
    low, high = torch.aminmax(ids)
    return int(low) < 0 or int(high) >= num_ids


def map_fingerprint(id_map: IdMap) -> torch.Tensor:
    """(16,) uint8 digest of everything that decides which rows an id gets, including unknown ids."""
    digest = hashlib.blake2b(digest_size=16)
    digest.update(repr((tuple(id_map.rows.shape), id_map.num_rows, id_map.seed)).encode())
    for part in (id_map.rows, id_map.weights):
        if part is not None:
            digest.update(str(part.dtype).encode())
            for first in range(0, len(part), 1 << 22):
                digest.update(part[first : first + (1 << 22)].cpu().contiguous().numpy().tobytes())
    return torch.frombuffer(bytearray(digest.digest()), dtype=torch.uint8)
