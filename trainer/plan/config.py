"""Configuration of `recpress plan`. Imports no torch, so that `--help` is fast."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from recpress.data.errors import InputError
from recpress.trainer.config import TrainConfig, at_least
from recpress.trainer.train.config import TrainModelConfig


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """The machines, which need not exist."""

    nodes: int = 1
    """Number of machines."""
    ranks_per_node: int = 8
    """GPUs per node, one rank each; with `--cluster.device cpu`, ranks per node."""
    device: Literal["cuda", "cpu"] = "cuda"
    """Device of the tables."""
    memory_gib: float = 80.0
    """Memory of one GPU; not used with `--cluster.device cpu`."""
    host_memory_gib: float = 1024.0
    """Memory of a node, shared by its ranks."""
    intra_gb_s: float = 600.0
    """Bandwidth between two GPUs of a node, 10^9 bytes per second, for TorchRec's planner."""
    inter_gb_s: float = 12.5
    """Bandwidth between nodes for each GPU, 10^9 bytes per second; 12.5 is 100 Gbit/s."""
    context_gib: float = 1.5
    """Memory of each GPU that the CUDA context, NCCL's buffers and the libraries take. An assumption, not measured."""

    def __post_init__(self) -> None:
        at_least(1, nodes=self.nodes, ranks_per_node=self.ranks_per_node)
        at_least(0, context_gib=self.context_gib)
        for name in ("memory_gib", "host_memory_gib", "intra_gb_s", "inter_gb_s"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise InputError(f"cluster.{name} is {value}, expected a number above 0")

    @property
    def world(self) -> int:
        """Number of ranks."""
        return self.nodes * self.ranks_per_node


@dataclass(frozen=True, kw_only=True)
class PlanConfig(TrainConfig):
    """Memory and sharding of `recpress train` with the same options, so that one TOML file serves both.

    The log either exists (`--data`, and `--factors`, `--hash`) or is described (`--users`, `--items`, `--dim`).
    """

    data: str = ""
    """The log, if it exists; only its footers are read."""
    out: str = ""
    """Folder of the model, as for `recpress train`; nothing is written there."""
    json: str | None = None
    """JSON file of all figures."""
    users: int = 0
    """Number of users of a described log."""
    items: int = 0
    """Number of items."""
    rows: int = 0
    """Number of interactions; 0: unknown, then the pairs of --negatives.reject-positives are not counted."""
    dim: int = 0
    """Dimension of the vectors. Default: that of the factors, or --model.tables.dim."""
    share: float = 0.25
    """Learned hash: rows as a share of the ids, without --hash."""
    rows_per_id: Literal[1, 2] = 1
    """Learned hash: rows per id; two have weights of 2 bytes each."""
    compare: bool = True
    """Compare trainable, frozen and hashed tables, with the smallest cluster for each."""
    cluster: ClusterConfig = field(default_factory=ClusterConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(0, users=self.users, items=self.items, rows=self.rows, dim=self.dim)
        if not 0 < self.share <= 1:
            raise InputError(f"share is {self.share}, expected a number in (0, 1]")
        described = [name for name in ("users", "items", "rows") if getattr(self, name)]
        if self.data and described:
            raise InputError(f"{described[0]}: set together with data, {self.data!r}; expected one of the two")
        if not self.data and not (self.users and self.items):
            raise InputError("data: missing; expected a log, or --users and --items, which describe one")
        if not self.data and (self.factors or self.hash):
            raise InputError("factors, hash: expected data, the log that they were made for")
        if not self.data and (self.user_features or self.item_features):
            raise InputError("user_features, item_features: expected data, a log that has them")


@dataclass(frozen=True, kw_only=True)
class PlanModelConfig(TrainModelConfig):
    """Memory and sharding of `recpress train --model` with the same options, so that one TOML file serves both.

    The log either exists (`--data`), or its features are described in the TOML file, with `num_ids`.
    """

    data: str = ""
    """The log, if it exists; a part of it is read for the statistics of numbers."""
    out: str = ""
    """Folder of the model, as for `recpress train`; nothing is written there."""
    json: str | None = None
    """JSON file of all figures."""
    rows: int = 0
    """Number of rows of a described log; 0: unknown."""
    list_length: float = 10.0
    """Mean length of the lists of a described log."""
    share: float = 0.25
    """Compared tables: hashed to this share of their ids."""
    compare: bool = True
    """Compare with trainable and with hashed tables, with the smallest cluster for each."""
    cluster: ClusterConfig = field(default_factory=ClusterConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(0, rows=self.rows, list_length=self.list_length)
        if not 0 < self.share <= 1:
            raise InputError(f"share is {self.share}, expected a number in (0, 1]")
        if self.data and self.rows:
            raise InputError(f"rows: set together with data, {self.data!r}; expected one of the two")
        if not self.data and self.maps:
            raise InputError("maps: expected data, the log that they were made for")
