"""Random numbers as pure functions of what they are for: a seed, a purpose, a row group."""

import hashlib

import numpy as np


def key(*place: int | str) -> int:
    """128 bits that are a hash of `place`: different places give unrelated random numbers."""
    # np.int64(3) and 3 are one place
    plain = tuple(part if isinstance(part, str) else int(part) for part in place)
    return int.from_bytes(hashlib.blake2b(repr(plain).encode(), digest_size=16).digest(), "little")


def philox(*place: int | str) -> np.random.Philox:
    """Counter-based bit generator (Salmon et al. 2011) of a place. Bit generators are stable from one numpy
    to the next (NEP 19): raw bits are the same on any machine."""
    return np.random.Philox(key=key(*place))


def generator(*place: int | str) -> np.random.Generator:
    """An independent generator for each place (a seed, a purpose, a row group ...)."""
    return np.random.Generator(philox(*place))
