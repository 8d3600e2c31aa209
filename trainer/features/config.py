"""Configuration of the features of a model: the tables `[features.NAME]` of a TOML file. Does not import torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from recpress.data.errors import InputError

FACTORIZED = "@factorize"
"""In place of a folder of factors: those of the pipeline."""
Kind = Literal["id", "list", "sequence", "float", "bucketized"]


@dataclass(frozen=True, kw_only=True)
class FeatureHash:
    """Maps the ids of a table to fewer rows, by a formula or by counts. `recpress hash` and --maps have the learned
    methods."""

    method: Literal["modulo", "universal", "double", "quotient-remainder", "frequency", "hybrid"] = "universal"
    """Hashing method (docs/train/hash.md)."""
    rows: int
    """Rows of the table."""
    rows_per_id: int = 0
    """Rows that are added for an id, a check: `double` and `quotient-remainder` have 2, the others 1. 0: any."""


@dataclass(frozen=True, kw_only=True)
class FeatureConfig:
    """One feature."""

    column: str = ""
    """Column of the log, or of its `users.parquet` or `items.parquet`; by default the name of the feature."""
    kind: Kind | None = None
    """`id`: one id per row; `list`: ids that are pooled; `sequence`: a list of which the last `max_length` ids count;
    `float`: a number; `bucketized`: a number whose bucket is an id. By default by the type of the column."""
    table: str = ""
    """Name of its embedding table; features with the same table share it. By default the name of the feature."""
    dimension: int = 0
    """Dimension of the table; 0: that of its frozen rows, otherwise --dim."""
    pooling: Literal["sum", "mean"] = "sum"
    """How the rows of a list become one vector."""
    max_length: int = 0
    """`sequence`: the last ids that count."""
    num_ids: int = 0
    """Number of ids of the table, to leave room for new ids; 0: as many as the log has."""
    hash: FeatureHash | None = None
    """Maps the ids of the table to fewer rows."""
    frozen: str | None = None
    """Folder of `recpress factorize`: the rows of the table are its user or item vectors, and are not trained. In a
    pipeline, "@factorize" is the folder of its factors."""
    storage: Literal["fp32", "fp16", "int8", "int4"] = "fp32"
    """How to store frozen rows."""
    sharding: Literal["auto", "table_wise", "row_wise", "column_wise", "table_row_wise"] = "auto"
    """How to shard the table; `auto`: the planner decides."""
    learning_rate: float | None = None
    """Learning rate of the table; by default --optimizer.table-learning-rate."""
    transform: tuple[Literal["log1p", "standardize"], ...] | None = None
    """`float`: `log1p`: sign(x) log(1 + |x|); `standardize`: mean 0 and variance 1 over rows of train. In this order;
    by default both."""
    missing: float | None = None
    """Number in place of a missing one, before the transform; by default 0 after it, the mean of a standardized
    feature. A `bucketized` feature has a bucket for missing numbers."""
    buckets: int = 32
    """`bucketized`: number of buckets with about as many rows of train each."""
    boundaries: tuple[float, ...] = ()
    """`bucketized`: boundaries of the buckets, ascending, in place of `buckets`."""

    def check(self, name: str) -> None:
        """Raise InputError, naming the feature, if settings do not fit each other."""
        where = f"features.{name}"
        numeric = self.kind in ("float", "bucketized")
        if self.kind == "sequence" and self.max_length < 1:
            raise InputError(f"{where}.max_length is {self.max_length}, expected at least 1 for a sequence")
        if self.max_length and self.kind != "sequence":
            raise InputError(f'{where}.max_length: expected kind = "sequence", not {self.kind!r}')
        for option, least in (("dimension", 0), ("num_ids", 0), ("buckets", 2)):
            if getattr(self, option) < least:
                raise InputError(f"{where}.{option} is {getattr(self, option)}, expected at least {least}")
        if self.kind == "float":
            of_table = [name for name in ("table", "dimension", "num_ids", "hash", "frozen") if getattr(self, name)]
            if given := of_table + ["learning_rate"] * (self.learning_rate is not None):
                raise InputError(f'{where}.{given[0]}: a float has no table; expected kind = "bucketized"')
        if (self.transform is not None or self.missing is not None) and self.kind != "float":
            option = "transform" if self.transform is not None else "missing"
            raise InputError(f'{where}.{option}: expected kind = "float", not {self.kind!r}')
        if numeric and (self.frozen or self.hash):
            raise InputError(f"{where}: the buckets of a number have neither frozen rows nor a hash")
        if self.boundaries and (self.kind != "bucketized" or list(self.boundaries) != sorted(set(self.boundaries))):
            raise InputError(f'{where}.boundaries: expected kind = "bucketized" and ascending numbers')
        if self.storage != "fp32" and not self.frozen:
            raise InputError(f"{where}.storage is {self.storage}: only frozen rows are stored in fewer bits")
        if self.storage in ("int8", "int4") and self.sharding == "column_wise":
            raise InputError(
                f"{where}.sharding: rows of {self.storage} are stored whole and cannot be sharded by column; "
                "expected table_wise or row_wise"
            )
        if self.learning_rate is not None and not (self.learning_rate >= 0 and not self.frozen):
            expected = "no frozen rows, which are not trained" if self.frozen else "at least 0"
            raise InputError(f"{where}.learning_rate is {self.learning_rate}, expected {expected}")
        if self.hash is not None and self.hash.rows < 1:
            raise InputError(f"{where}.hash.rows is {self.hash.rows}, expected at least 1")
        if self.hash is not None and self.hash.rows_per_id:
            actual = 2 if self.hash.method in ("double", "quotient-remainder") else 1
            if self.hash.rows_per_id != actual:
                raise InputError(
                    f"{where}.hash.rows_per_id is {self.hash.rows_per_id}, but {self.hash.method} has {actual}"
                )
