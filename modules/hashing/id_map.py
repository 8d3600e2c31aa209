"""A map from the ids of one table to fewer rows: what every hashing method makes and every module applies."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

Unknown = Literal["hash", "error"]
"""What becomes of an id that a map does not cover: the row of `IdMap.hashed`, or an error."""


@dataclass(frozen=True, eq=False, kw_only=True)
class IdMap:
    """Id -> one or two rows of a table of `num_rows` rows; the vector of an id is the (weighted) sum of its rows.

    Args:
        rows: (num_ids, ways) int32, each in [0, num_rows); ways is 1, or 2 for double hashing and the like. May be a
            view of a memory map.
        num_rows: rows of the table.
        weights: (num_ids, ways) float16 or float32, or None for ones.
        method: name of the method that made it.
        vocabulary: fingerprint of the ids that it maps; None where nobody gave one.
        computed: the rows follow from the id by a formula, so that serving needs no map (`nbytes` is 0).
        seed: of the hash that gives rows to ids that the map does not know (`hashed`).

    Raises:
        ValueError: shapes that do not fit; a row outside of the table, with the id that has it.
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
            raise ValueError(f"id map: rows are {self.rows.dtype} {tuple(self.rows.shape)}, expected int32 (ids, ways)")
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

    @property
    def num_ids(self) -> int:
        """Ids that the map covers: 0 to num_ids - 1."""
        return self.rows.shape[0]

    @property
    def ways(self) -> int:
        """Rows of an id."""
        return self.rows.shape[1]

    @property
    def bits(self) -> int:
        """Bits that one row number takes when packed."""
        return max(1, (self.num_rows - 1).bit_length())

    @property
    def nbytes(self) -> int:
        """Bytes of the map, bit-packed, with its weights; 0 where it is computed."""
        if self.computed:
            return 0
        weights = 0 if self.weights is None else self.weights.nbytes
        return -(-self.num_ids * self.ways * self.bits // 8) + weights

    def hashed(self, ids: torch.Tensor) -> torch.Tensor:
        """Rows of ids that the map does not cover: (n,) int64 of any value -> (n, ways) int32."""
        return universal_hash(ids, self.num_rows, self.seed, self.ways)

    def save(self, folder: str | Path) -> None:
        """Write `rows.npy` (and `weights.npy`) and, last, `map.json` into `folder`, which exists."""
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
        """What `save` wrote, its rows and weights as memory maps.

        Args:
            vocabulary: fingerprint that the map must have been made for; None accepts any.

        Raises:
            ValueError: a file is missing or damaged; the map is of another vocabulary.
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
            raise ValueError(f"{folder}: not a whole id map: {error}") from error
        if vocabulary is not None and found.vocabulary != vocabulary:
            raise ValueError(
                f"{folder}: made for the vocabulary {found.vocabulary}, expected {vocabulary}: the same ids mean others"
            )
        return found


def universal_hash(ids: torch.Tensor, num_rows: int, seed: int, ways: int = 1) -> torch.Tensor:
    """Rows in [0, num_rows) of ids of any value: (n,) int64 -> (n, ways) int32.

    The finalizer of MurmurHash3 (Appleby), a bijection of 64 bits, after an offset that (seed, way) draws; then the
    remainder. Not adversarially strong: it spreads ids, no more.
    """
    ways_rows = []
    for way in range(ways):
        offset = int(np.random.Philox(key=[seed % 2**64, way]).random_raw())
        x = ids.long() + _signed(offset)
        for shift, factor in ((33, 0xFF51AFD7ED558CCD), (33, 0xC4CEB9FE1A85EC53), (33, 1)):
            x = (x ^ _logical_shift(x, shift)) * _signed(factor)
        ways_rows.append(_logical_shift(x, 1).remainder(num_rows).to(torch.int32))
    return torch.stack(ways_rows, 1)


def _signed(value: int) -> int:
    """The int64 with the bits of an unsigned one."""
    return value - (1 << 64) if value >= 1 << 63 else value


def _logical_shift(x: torch.Tensor, bits: int) -> torch.Tensor:
    """torch shifts the sign in; this shifts zeros in."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def map_fingerprint(id_map: IdMap) -> torch.Tensor:
    """(16,) uint8 of all that decides which rows an id gets, those of unknown ids included."""
    digest = hashlib.blake2b(digest_size=16)
    digest.update(repr((tuple(id_map.rows.shape), id_map.num_rows, id_map.seed)).encode())
    for part in (id_map.rows, id_map.weights):
        if part is not None:
            digest.update(str(part.dtype).encode())
            for first in range(0, len(part), 1 << 22):
                digest.update(part[first : first + (1 << 22)].cpu().contiguous().numpy().tobytes())
    return torch.frombuffer(bytearray(digest.digest()), dtype=torch.uint8)
