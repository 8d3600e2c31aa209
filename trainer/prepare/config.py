"""Configuration of the stages that write logs. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from recpress.data.config import IngestConfig, LayoutConfig, SampleConfig, Schema, SynthConfig, SynthCriteoConfig
from recpress.trainer.config import at_least


@dataclass(frozen=True, kw_only=True)
class SynthCommand(SynthConfig):
    """A synthetic log with planted tastes, power-law activity and popularity, and one held-out interaction per user."""

    out: str
    """Folder of the log. Must not exist, except with --overwrite."""
    overwrite: bool = False
    """Replace an existing --out."""


@dataclass(frozen=True, kw_only=True)
class SynthCriteoCommand(SynthCriteoConfig):
    """A synthetic log with Criteo's columns: a label, 13 numbers, 26 categorical features whose ids form groups."""

    out: str
    """Folder of the log. Must not exist, except with --overwrite."""
    overwrite: bool = False
    """Replace an existing --out."""


@dataclass(frozen=True, kw_only=True)
class IngestCommand(IngestConfig):
    """How files of another format become a log."""

    out: str
    """Folder of the log. Must not exist, except with --overwrite."""
    overwrite: bool = False
    """Replace an existing --out."""


@dataclass(frozen=True, kw_only=True)
class SplitConfig:
    """Hold one row of each user out of a log, e.g. to choose settings without the test rows."""

    data: str
    """The log."""
    out: str
    """The log to write: train without the held-out rows, test with them and their negatives. Must not exist, except
    with --overwrite."""
    schema: Schema = field(default_factory=Schema)
    by: Literal["random", "last"] = "random"
    """Which row of each user is held out; `last` needs a time column."""
    negatives: int = 99
    """Items without an interaction of the user, drawn for each held-out row."""
    seed: int = 0
    """Seed of both draws."""
    overwrite: bool = False
    """Replace an existing --out."""


@dataclass(frozen=True, kw_only=True)
class SampleCommand:
    """Write a sample of a log once, as a separate log, for many runs.

    `recpress train --data OUT --sample.rate 1` then trains on exactly the rows that `--data DATA` with these --sample
    options would, and reads nothing else."""

    data: str
    """The log."""
    out: str
    """The log to write. Must not exist, except with --overwrite. Its train part has the sampled rows with all columns;
    held-out parts, side tables and vocabularies are copied."""
    schema: Schema = field(default_factory=Schema)
    sample: SampleConfig = field(default_factory=lambda: SampleConfig(rate=0.1))
    shuffle: bool = False
    """Write the rows in a random order, by way of the local disk; otherwise in the order of the log. A shuffled log may
    be sampled by --sample.kind block."""
    shuffle_rows: int = 1 << 22
    """Rows that are shuffled in memory at a time; memory use is up to five times as many."""
    on_bad_file: Literal["stop", "skip"] = "stop"
    """A file or row group of train that cannot be read, after the retries: `stop` ends the stage with its name; `skip`
    leaves its rows out, names and counts it (docs/train/log.md)."""
    layout: LayoutConfig = field(default_factory=LayoutConfig)
    """Files and row groups."""
    overwrite: bool = False
    """Replace an existing --out."""

    def __post_init__(self) -> None:
        at_least(1, shuffle_rows=self.shuffle_rows)
