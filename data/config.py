"""Configuration of the data layer. Free of torch, so that `--help` and config errors answer at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Schema:
    """Which columns of a log mean what. Columns that are not named are never read."""

    user: str = "user_id"
    """Dense user id, integer, 0-based."""
    item: str = "item_id"
    """Dense item id, integer, 0-based."""
    label: str | None = None
    """Label, rating or count of the interaction."""
    time: str | None = None
    """Time of the interaction."""
    categorical: tuple[str, ...] = ()
    """Further categorical columns: integers, or lists of integers."""
    floats: tuple[str, ...] = ()
    """Further float columns."""


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """Uniform random sample of the rows. Membership depends on the seed and the row's place in the log alone."""

    rate: float = 1.0
    """Share of the rows that are in the sample, in (0, 1]."""
    seed: int = 0
    """Seed of the membership."""


@dataclass(frozen=True, kw_only=True)
class StreamConfig:
    """How the rows of a log become batches."""

    batch_size: int = 4096
    """Rows of a batch on each rank."""
    shuffle: bool = True
    """Shuffle files, row groups and rows; otherwise the order of the files."""
    buffer_rows: int = 1 << 20
    """Rows that are shuffled together; bounds the memory of the stream."""
    seed: int = 0
    """Seed of the order; the epoch is mixed in."""
    threads: int = 1
    """Background threads that read and decode row groups."""


@dataclass(frozen=True, kw_only=True)
class NegativesConfig:
    """Where the negative items of a positive row come from."""

    kind: Literal["uniform", "popularity", "in-batch"] = "uniform"
    """`uniform` over all items; `popularity`: proportional to count ** power; `in-batch`: the other rows' items."""
    count: int = 4
    """Negatives for each positive row (not used by `in-batch`)."""
    power: float = 0.75
    """Exponent of `popularity`."""
    reject_positives: bool = False
    """Draw again where a negative is one of the user's own positives (needs memory for the pairs of the log)."""
    seed: int = 0
    """Seed of the draws; mixed with the epoch and the place of the batch."""
