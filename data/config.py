"""Configuration of the data layer. Free of torch, so that `--help` and config errors answer at once."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Literal

from recpress.data.errors import InputError

MOST_HASHED = 1 << 31
"""Largest number of ids of a hashed column: 32 bits of the hash choose one."""


@dataclass(frozen=True, kw_only=True)
class Schema:
    """The columns of a log and their meaning. Other columns are never read."""

    user: str = "user_id"
    """Dense user id, integer, 0-based. Empty: the log has none (Criteo); stages that need pairs raise an error."""
    item: str = "item_id"
    """Dense item id, integer, 0-based. Empty: the log has none."""
    label: str | None = None
    """Label, rating or count of the interaction."""
    time: str | None = None
    """Time of the interaction."""
    categorical: tuple[str, ...] = ()
    """Further categorical columns: integers, or lists of integers."""
    floats: tuple[str, ...] = ()
    """Further float columns."""
    hashed: tuple[str, ...] = ()
    """COLUMN=IDS: a column of raw ids (integers, text or bytes) that are hashed into so many ids while reading. A raw
    id becomes the same id in all columns with the same number. A column that the schema does not name is
    categorical."""

    @property
    def hash_sizes(self) -> dict[str, int]:
        """`hashed` as column -> number of ids. Raises InputError if an entry cannot be used."""
        sizes: dict[str, int] = {}
        for entry in self.hashed:
            name, _, size = entry.rpartition("=")
            if not name or "=" in name or "," in name:
                raise InputError(f"schema.hashed: {entry!r}; expected COLUMN=IDS, one entry per column")
            if not (size.isascii() and size.isdigit() and 0 < int(size) <= MOST_HASHED):
                raise InputError(f"schema.hashed: {entry!r}; expected COLUMN=IDS, with 1 to {MOST_HASHED:,} ids")
            if name in (self.label, self.time, *self.floats):
                raise InputError(f"schema.hashed: {name!r} is no column of ids: the schema has it as numbers")
            if name in sizes:
                raise InputError(f"schema.hashed: {name!r} occurs twice")
            sizes[name] = int(size)
        return sizes


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """Random sample of the rows, each with the same probability; a pure function of the seed and the log."""

    kind: Literal["rows", "block", "user"] = "rows"
    """`rows`: single rows, independently; reads all of the log. `block`: row groups; reads only these; for shuffled
    logs (docs/train/sampling.md has the cost on other logs). `user`: the same share of each user's rows; reads the user
    column once before."""
    rate: float = 1.0
    """Share of the rows that are in the sample, in (0, 1]."""
    seed: int = 0
    """Seed of the sample."""

    def __post_init__(self) -> None:
        if not 0 < self.rate <= 1:
            raise InputError(f"sample.rate is {self.rate}, expected a number in (0, 1]")


@dataclass(frozen=True, kw_only=True)
class StreamConfig:
    """How the rows of a log become batches."""

    batch_size: int = 4096
    """Rows of a batch on each rank."""
    shuffle: bool = True
    """Shuffle files, row groups and rows; otherwise the order of the files."""
    buffer_rows: int = 1 << 20
    """Rows of all ranks that are shuffled together; bounds the memory of the stream (see docs/how/stream.md)."""
    interleave: int = 8
    """Number of file segments interleaved in each batch (see `recpress.data.stream.order`). A multiple of the world
    size shares the decoding evenly between ranks; one row group per segment is in memory."""
    seed: int = 0
    """Seed of the order; the epoch is mixed in."""
    num_threads: int = 0
    """Background threads that read and decode row groups. 0: half of the processor cores of this rank (the cores of the
    machine divided by LOCAL_WORLD_SIZE), at least 1, at most 4."""
    prefetch_batches: int = 2
    """Batches that a background thread makes ahead of the training step; 0: batches are made between the steps."""
    on_bad_file: Literal["stop", "skip"] = "stop"
    """A file or row group that cannot be read or decoded, after the retries: `stop` ends the run and names it; `skip`
    names it, counts it, and replaces its rows with rows of other row groups (docs/train/log.md)."""

    @property
    def chosen_threads(self) -> int:
        """`num_threads`, or what 0 means on this machine."""
        if self.num_threads:
            return self.num_threads
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return min(4, max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")) // 2))


DENSE = 0.01
"""Share of all pairs of a user and an item that a log must have for `NegativesConfig.rejects`."""
REJECT_ROWS = 1 << 24
"""Rows of a log of which `NegativesConfig.rejects` holds the pairs in memory: 160 MiB on each rank at most."""


@dataclass(frozen=True, kw_only=True)
class NegativesConfig:
    """How negative items are sampled."""

    kind: Literal["uniform", "popularity", "in-batch"] = "uniform"
    """`uniform`: over all items; `popularity`: as count ** power; `in-batch`: the other rows' items."""
    count: int = 4
    """Negatives for each positive row (not used by `in-batch`)."""
    shared: bool = False
    """One set of `count` negatives for all rows of a batch: many more pairs for the same lookups."""
    power: float = 0.75
    """Exponent of `popularity`."""
    reject_positives: Literal["auto", "yes", "no"] = "auto"
    """Draw again if a negative is one of the user's positives. `yes` reads the users and items of the log once more on
    every rank, and uses about 10 bytes of memory per row there. `auto`: if that matters and is cheap, see `rejects`."""
    seed: int = 0
    """Seed of the draws; mixed with the epoch and the position of the batch."""

    def __post_init__(self) -> None:
        for name, given in (("shared", self.shared), ("reject_positives", self.reject_positives == "yes")):
            if self.kind == "in-batch" and given:
                raise InputError(
                    f"negatives.{name}: expected kind 'uniform' or 'popularity', which draw; not 'in-batch'"
                )

    def rejects(self, *, rows: int, users: int, items: int, sample: SampleConfig) -> bool:
        """Whether positives of a log of `rows` rows are rejected.

        With `auto` they are if a user has DENSE of the items or more, on average, the log has at most REJECT_ROWS rows,
        and the sample reads all row groups in any case. On sparser logs rejection changes nothing
        (benchmarks/README.md, "Rejecting positives").
        """
        if self.reject_positives != "auto":
            return self.reject_positives == "yes"
        reads_all = sample.kind != "block" or sample.rate == 1
        return self.kind != "in-batch" and reads_all and DENSE * users * items <= rows <= REJECT_ROWS


@dataclass(frozen=True, kw_only=True)
class LayoutConfig:
    """Files and row groups of a log that recpress writes."""

    rows_per_file: int = 1 << 24
    """Rows per file; a part with more rows has several files."""
    row_group_rows: int = 1 << 18
    """Rows per row group: the unit that is read, and distributed over ranks."""


@dataclass(frozen=True, kw_only=True)
class SynthConfig:
    """A synthetic log: planted tastes, power-law activity and popularity, one held-out interaction per user."""

    users: int = 6000
    """Number of users; each has at least one row."""
    items: int = 3000
    """Number of items."""
    rows: int = 500_000
    """Rows of train. No user has an item twice, so this is at most a small part of users x items."""
    tastes: int = 24
    """Groups of related items: the rank of the planted structure."""
    tastes_per_user: int = 8
    """Number of tastes of a user."""
    taste_decay: float = 0.6
    """Weight of each further taste of a user relative to the previous one, in (0, 1]."""
    user_skew: float = 0.8
    """Exponent of the power law of the users' activity; 0 makes them equal."""
    item_skew: float = 0.8
    """Exponent of the power law of the items' popularity within their taste."""
    taste_skew: float = 0.4
    """Exponent of the power law of how many users prefer a taste."""
    held_out_users: int = 10_000
    """Largest number of users with one later, held-out interaction; 0: no held-out part."""
    negatives: int = 99
    """Items without an interaction of the user, drawn for each held-out interaction."""
    start_time: int = 1_700_000_000
    """Time of the first row, in seconds since 1970."""
    days: int = 90
    """Time from the first row to the last."""
    seed: int = 0
    """Seed of everything. A row depends on it and on the sizes above, never on the layout."""
    layout: LayoutConfig = field(default_factory=LayoutConfig)
    """Files and row groups."""


@dataclass(frozen=True, kw_only=True)
class SynthCriteoConfig:
    """A synthetic log with Criteo's columns: label, 13 numbers, 26 categorical features with groups of similar ids."""

    rows: int = 1_000_000
    """Rows of train."""
    test_rows: int | None = None
    """Rows of test, drawn like those of train. By default a fifth of `rows`."""
    ids: int = 400_000
    """Ids of all features together, spread over them as Criteo's are; up to 33,762,577, Criteo's own."""
    skew: float = 0.8
    """Exponent of the power law of how often the ids of a feature are accessed."""
    groups: int = 64
    """Largest number of groups of similar ids per feature."""
    deviation: float = 0.3
    """Share of an id's latent vector that is individual, in [0, 1]; 0: all ids of a group have the same vector."""
    latent: int = 2
    """Dimension of the latent vectors that interact."""
    effects: float = 1.5
    """Standard deviation of the part of the logit from single ids."""
    interactions: float = 0.6
    """Standard deviation of the part of the logit from pairs of ids."""
    dense: float = 0.5
    """Standard deviation of the part of the logit from the numbers."""
    noise: float = 0.3
    """Standard deviation of the noise in the logit."""
    positives: float = 0.256
    """Share of the labels that are 1; Criteo's own by default."""
    seed: int = 0
    """Seed of everything. A row depends on it, its place and the options above but `rows` and `test_rows`."""
    layout: LayoutConfig = field(default_factory=LayoutConfig)
    """Files and row groups."""

    @property
    def held_out(self) -> int:
        """`test_rows`, or its default."""
        return max(1, self.rows // 5) if self.test_rows is None else self.test_rows


@dataclass(frozen=True, kw_only=True)
class IngestConfig:
    """How files of another format become a log."""

    input: str
    """Folder, file or glob, local or a URI; of the NCF format also the start of its names (`dir/ml-1m`)."""
    format: Literal["auto", "movielens", "ncf", "lightgcn", "criteo", "csv", "tsv", "json", "parquet"] = "auto"
    """`auto`: by the names of the files, and for Criteo by the first line. `json` is JSON lines."""
    user: str = "user_id"
    """Column of the user (csv, tsv, json, parquet). Empty: there is none."""
    item: str = "item_id"
    """Column of the item. Empty: there is none."""
    label: str | None = None
    """Column of the label, rating or count (csv, tsv, json, parquet)."""
    time: str | None = None
    """Column of the time (csv, tsv, json, parquet): numbers, or dates and timestamps, of one kind in all files."""
    categorical: tuple[str, ...] = ()
    """Further categorical columns (csv, tsv, json, parquet; of json and parquet also lists). A missing value is a
    category too. `C*` is all columns without another role whose names match."""
    floats: tuple[str, ...] = ()
    """Further float columns (csv, tsv, json, parquet), by names or patterns. A missing value is NaN."""
    same: tuple[str, ...] = ()
    """Columns that share one vocabulary, as `item_id=history`: a raw id has the same number in all of them."""
    split_column: str | None = None
    """Column that says `train`, `val` or `test` of each row (csv, tsv, json, parquet)."""
    columns: tuple[str, ...] = ()
    """Names of the columns of a csv or tsv that has no header line."""
    delimiter: str = ""
    """Character between the fields of text (`\\t`: a tab). Empty: that of the format; of csv and tsv also `;`, tab, `|`
    or `,` if the header then has the named columns."""
    quoting: Literal["auto", "on", "off"] = "auto"
    """Whether `"` encloses fields of text. `auto`: on for csv, off for tsv and the formats of public data sets."""
    encoding: str = "auto"
    """Encoding of text, as Python names it. `auto`: UTF-8, or UTF-16 or UTF-32 with a byte order mark."""
    null_values: tuple[str, ...] = ()
    """Texts that mean a missing value, in all columns of text. By default the empty one, and for numbers also NA, NaN,
    NULL, None and the like."""
    id_type: Literal["auto", "int", "string"] = "auto"
    """Type of the raw ids. `auto`: that of the vocabulary that is extended, or of the file; ids of text are integers if
    all of them, in all files, are written as integers without leading zeros. `int`: also `007` is 7."""
    extend: str | None = None
    """An ingested log to extend: its ids do not change, new ids follow, counts add up."""
    holdout: Literal["none", "last", "random"] = "none"
    """Hold one interaction per user out of train, as the test part: the last by time, or a random one."""
    negatives: int = 99
    """Items drawn for each held-out interaction of `holdout`."""
    seed: int = 0
    """Seed of `holdout`."""
    allow_empty_users: bool = False
    """Skip users without items in LightGCN files; otherwise they are an error."""
    memory_gib: float = 8.0
    """Memory limit of one vocabulary; 8 GiB hold about 200 M integer ids, or 100 M strings of 10 characters."""
    layout: LayoutConfig = field(default_factory=LayoutConfig)
    """Files and row groups."""

    def __post_init__(self) -> None:
        if self.encoding != "auto":
            try:
                "".encode(self.encoding)
            except (LookupError, ValueError) as error:
                raise InputError(f"encoding is {self.encoding!r}; expected one that Python knows ({error})") from error
