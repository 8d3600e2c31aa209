"""Which rows of a log are in a sample: a pure function of the seed and a row's place in the log.

Every row is in the sample with probability `rate`, independently of all others (Bernoulli sampling). Instead
of one coin a row, the gaps between members are drawn: they follow the geometric distribution,
P(gap = k) = rate (1 - rate)^k (skips: Vitter 1984, "Faster methods for random sampling"), so that the work
is proportional to the rows that are kept, and the size of the sample is known without reading any data.
"""

from __future__ import annotations

import hashlib
import math

import numpy as np
from recpress.data.config import SampleConfig
from recpress.data.errors import InputError


def key(*place: int | str) -> int:
    """128 bits that are a hash of `place`: different places give unrelated random numbers."""
    # np.int64(3) and 3 are one place
    plain = tuple(part if isinstance(part, str) else int(part) for part in place)
    return int.from_bytes(hashlib.blake2b(repr(plain).encode(), digest_size=16).digest(), "little")


def philox(*place: int | str) -> np.random.Philox:
    """Counter-based bit generator (Salmon et al. 2011) of a place. Bit generators are stable from one numpy
    to the next (NEP 19): raw bits are the same on any machine."""
    return np.random.Philox(key=key(*place))


def check_rate(rate: float) -> float:
    """Returns the rate as a float; raises InputError outside (0, 1] and for NaN."""
    if not 0.0 < rate <= 1.0:  # also false for NaN
        raise InputError(f"sample rate is {rate}: expected a number in (0, 1]")
    return float(rate)


def membership(seed: int, rate: float, file_ordinal: int, row_group: int, num_rows: int) -> np.ndarray:
    """Rows of one row group that are in the sample.

    Depends on nothing but the arguments; of two groups that differ in `num_rows` alone, the smaller has those
    members of the larger that lie in it.

    Returns: sorted int64 indices in [0, num_rows).
    Raises: InputError for a rate outside (0, 1].
    """
    rate = check_rate(rate)
    if rate == 1.0:
        return np.arange(num_rows, dtype=np.int64)
    # Raw bits rather than Generator.geometric, whose algorithm may change.
    bits = philox("sample", seed, file_ordinal, row_group)
    parts: list[np.ndarray] = []
    last = -1  # the latest member
    while last < num_rows:
        mean = (num_rows - last) * rate
        raw = bits.random_raw(int(mean + 4.0 * math.sqrt(mean)) + 16)
        uniform = ((raw >> np.uint64(11)).astype(np.float64) + 1.0) * 2.0**-53  # in (0, 1]
        gaps = np.minimum(np.floor(np.log(uniform) / math.log1p(-rate)), float(num_rows)).astype(np.int64)
        members = last + np.cumsum(gaps + 1)
        parts.append(members)
        last = int(members[-1])
    members = np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)
    return members[: np.searchsorted(members, num_rows)]


def selected(
    sample: SampleConfig | None, complement: bool, file_ordinal: int, row_group: int, num_rows: int
) -> np.ndarray | None:
    """Rows of one row group that are read: the sample, or with `complement` the rows that are not in it.

    `sample=None` is the sample of all rows. Returns sorted int64 indices, or None for all rows of the group.
    """
    if sample is None or check_rate(sample.rate) == 1.0:
        return np.empty(0, dtype=np.int64) if complement else None
    members = membership(sample.seed, sample.rate, file_ordinal, row_group, num_rows)
    if not complement:
        return members
    others = np.ones(num_rows, dtype=bool)
    others[members] = False
    return np.flatnonzero(others)


def selected_count(
    sample: SampleConfig | None, complement: bool, file_ordinal: int, row_group: int, num_rows: int
) -> int:
    """Number of rows that `selected` gives, without reading data."""
    if sample is None or check_rate(sample.rate) == 1.0:
        return 0 if complement else num_rows
    members = len(membership(sample.seed, sample.rate, file_ordinal, row_group, num_rows))
    return num_rows - members if complement else members
