"""The methods that compress the tables of a model of clicks: their settings, their sizes, and their tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import torch
from torchrec import EmbeddingBagConfig

from recpress.modules.config import HashConfig, HashMethod
from recpress.modules.hashing.budget import DistortionSplit, split_by_cap, split_by_ids
from recpress.modules.hashing.methods import build_map
from recpress.modules.hashing.shared_rows import shared_rows
from recpress.modules.hashing.table_stats import TableStats
from recpress.trainer.compare.click.cafe import SLOT_BYTES, SLOTS, CafeTable, HotRows
from recpress.trainer.compare.click.cce import ClusteredTable
from recpress.trainer.compare.click.robe import RobeArray, RobeTable
from recpress.trainer.compare.click.tables import IdTable, MappedTable, Tables

NAMES = {
    "universal": ("Hashing trick", "One hashed row per id (Weinberger et al.)."),
    "double": ("Double hash", "The sum of two hashed rows (Zhang et al.)."),
    "quotient-remainder": ("Quotient-remainder", "A row by quotient and one by remainder, multiplied or added (Shi)."),
    "frequency": ("Frequency", "The most frequent ids have exclusive rows, the rest share by modulo."),
    "hybrid": ("Hybrid", "The most frequent ids have exclusive rows, the rest share by double hash (Zhang et al.)."),
    "robe": ("ROBE", "Blocks of one array for all tables, from hashed positions (Desai et al.)."),
    "cce": ("CCE", "Chunks of two tables each; rows are clustered after epochs (Tsang and Ahle)."),
    "cafe": ("CAFE", "A sketch of gradient norms gives ids exclusive rows during training (Zhang et al.)."),
    "cluster": ("Cluster", "k-means of the full tables, without the counts."),
    "learned": ("Learned, one row", "Clusters of the full tables, weighted by the counts and by the curvature."),
    "learned-2": ("Learned", "The sum of two rows per id, from the full tables, the counts and the curvature."),
}
"""Key -> (name, description)."""
WARM = ("cluster", "learned", "learned-2")
"""Methods that are made from the trained full tables."""
Split = Literal["cap", "distortion"]


@dataclass(frozen=True, kw_only=True)
class ClickSetting:
    """What is chosen for a method on the validation rows."""

    method: str
    split: Split = "cap"
    """How the tables share the rows: with a common cap, which leaves small tables full, or by distortion."""
    exclusive_share: float = 0.5
    """`frequency`, `hybrid`: share of exclusive rows."""
    operation: Literal["product", "sum"] = "product"
    """`quotient-remainder`"""
    block: int = 16
    """`robe`: consecutive numbers."""
    chunks: int = 4
    """`cce`"""
    shared: float = 0.5
    """`cafe`: share of the rows that are shared."""
    threshold: float = 10.0
    """`cafe`: score from which an id is hot."""
    count_exponent: float = 0.5
    """`learned`: exponent of the count in an id's weight."""
    weighted: bool = False
    """`learned-2`: each of the two rows has a weight."""
    start: Literal["full", "random"] = "full"
    """`cluster`, `learned`: start from the full tables and their network, or from random weights."""
    rate: float = 0.1
    """`cluster`, `learned`: factor of the learning rates if they start from the full tables."""

    def words(self) -> dict[str, Any]:
        """For reports: what was chosen, by name."""
        return {axis: getattr(self, axis) for axis, values in axes(self.method).items() if len(values) > 1}


def axes(method: str) -> dict[str, tuple[Any, ...]]:
    """The settings that a method has, by axis; the search starts at the first value of each."""
    if method == "robe":
        return {"block": (16, 4, 1, 8)}
    if method in WARM:
        rates = {"rate": (0.1, 0.03, 0.3)}
        exponents = {} if method == "cluster" else {"count_exponent": (0.5, 1.0, 0.25, 0.0)}
        weighted = {"weighted": (False, True)} if method == "learned-2" else {}
        return {**rates, **exponents, "split": ("distortion", "cap"), **weighted, "start": ("full", "random")}
    own: dict[str, dict[str, tuple[Any, ...]]] = {
        "quotient-remainder": {"operation": ("product", "sum")},
        "frequency": {"exclusive_share": (0.5, 0.75, 0.25)},
        "hybrid": {"exclusive_share": (0.5, 0.75, 0.25)},
        "cce": {"chunks": (4, 2, 1)},
        "cafe": {"threshold": (10.0, 30.0, 100.0), "shared": (0.5, 0.7, 0.3)},
    }
    return {**own.get(method, {}), "split": ("cap",)}


@dataclass(frozen=True)
class Full:
    """What maps are learned from: the trained full tables."""

    weights: dict[str, torch.Tensor]
    """Table -> (ids, dim) float32."""
    scaled: dict[str, torch.Tensor]
    """The weights in units of the loss: the squared distance of two ids is twice the loss of an access that takes one
    for the other, to second order."""


@dataclass(frozen=True)
class Size:
    """Of all tables of one method."""

    rows: int
    """Embedding rows, of the dimension of the tables."""
    row_bytes: int
    map_bytes: int
    """Of what finds the rows of an id, as stored: bit-packed row numbers and weights of maps; lists of the ids with
    exclusive rows; the sketch of CAFE. 0 for formulas."""
    serving_map_bytes: int
    """The same with int32 numbers."""

    @property
    def bytes(self) -> int:
        return self.row_bytes + self.map_bytes


class Compressor:
    """Makes the tables of each method within a budget.

    Args:
        configs: the full tables, all of one dimension.
        counts: table -> how often its ids occur in train.
        lists: features with a list of ids per row.
        epochs: that a model is trained for at most.
    """

    def __init__(
        self,
        configs: list[EmbeddingBagConfig],
        counts: Mapping[str, torch.Tensor],
        lists: Sequence[str],
        epochs: int,
    ) -> None:
        self.configs, self.lists = configs, lists
        self.dim = configs[0].embedding_dim
        self.names = [config.name for config in configs]
        self.ids = [config.num_embeddings for config in configs]
        self.counts = {name: found.float() for name, found in counts.items()}
        self.clusterings = max(1, int(0.7 * epochs))  # the authors cluster after 7 of 10 epochs
        self._splits: dict[tuple[float, int], DistortionSplit] = {}

    def full(self) -> Tables:
        """One row per id."""
        tables = {name: MappedTable(ids, self.dim) for name, ids in zip(self.names, self.ids, strict=True)}
        return Tables(self.configs, tables, self.lists)

    def rows(self, setting: ClickSetting, full: Full, budget: int, seed: int) -> list[int]:
        """Rows of each table. Raises ValueError if the method cannot use the budget."""
        if setting.method == "robe":
            return split_by_ids(self.ids, budget)  # of one array
        if setting.split == "distortion":
            return self._split(setting, full, seed).rows(budget)
        return split_by_cap(self.ids, budget)

    def _split(self, setting: ClickSetting, full: Full, seed: int) -> DistortionSplit:
        key = setting.count_exponent, seed
        if key not in self._splits:
            tables = [self._stats(name, full) for name in self.names]
            self._splits[key] = DistortionSplit(tables, self._config(setting, seed))
        return self._splits[key]

    def rows_within_bytes(self, setting: ClickSetting, full: Full, limit: int, seed: int) -> list[int]:
        """The most rows that fit, with what finds them. Raises ValueError if none do."""

        if setting.split == "distortion":
            return self._split(setting, full, seed).rows_within(
                lambda place, rows: 4 * self.dim * rows + self._map_bytes(setting, place, rows), limit
            )

        def fits(budget: int) -> bool:
            return self.size(setting, self.rows(setting, full, budget, seed)).bytes <= limit

        low, high = len(self.ids), sum(self.ids)
        if not fits(low):
            raise ValueError(f"does not fit: its map alone takes more than {limit:,} bytes")
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if fits(middle) else (low, middle - 1)
        return self.rows(setting, full, low, seed)

    def size(self, setting: ClickSetting, rows: Sequence[int]) -> Size:
        """Of the tables that `make` makes. A table with as many rows as ids needs no map."""
        stored = sum(self._map_bytes(setting, place, number) for place, number in enumerate(rows))
        serving = sum(self._map_bytes(setting, place, number, serving=True) for place, number in enumerate(rows))
        total = sum(rows)
        return Size(total, 4 * self.dim * total, stored, serving)

    def _map_bytes(self, setting: ClickSetting, place: int, rows: int, *, serving: bool = False) -> int:
        ids = self.ids[place]
        if rows >= ids or setting.method == "robe":
            return 0
        bits, words = _map_size(setting, ids, rows)
        return 4 * words if serving else -(-bits // 8)

    def make(self, setting: ClickSetting, rows: Sequence[int], full: Full, seed: int) -> Tables:
        """The tables. Raises ValueError if the method cannot use the rows."""
        torch.manual_seed(seed)
        firsts = dict(zip(self.names, torch.tensor([0, *self.ids[:-1]]).cumsum(0).tolist(), strict=True))
        modules: dict[str, IdTable] = {}
        array = None
        if setting.method == "robe":
            array = RobeArray(self.dim * sum(rows), self.dim, min(setting.block, self.dim), seed)
        hot = sum(_hot(setting, number) for ids, number in zip(self.ids, rows, strict=True) if number < ids)
        if setting.method == "cafe" and not hot:
            raise ValueError("cafe: no hot rows")
        sketch = HotRows(hot, self.dim, setting.threshold) if setting.method == "cafe" else None
        for name, ids, number in zip(self.names, self.ids, rows, strict=True):
            if array is not None:
                modules[name] = RobeTable(array, firsts[name])
            elif number >= ids:
                warm = setting.method in WARM and setting.start == "full"
                modules[name] = MappedTable(ids, self.dim, start=full.weights[name] if warm else None)
            elif setting.method == "cce":
                modules[name] = ClusteredTable(ids, number, self.dim, setting.chunks, seed, self.clusterings)
            elif sketch is not None:
                modules[name] = CafeTable(sketch, firsts[name], number - _hot(setting, number), self.dim)
            else:
                modules[name] = self._mapped(setting, name, number, full, seed)
        return Tables(self.configs, modules, self.lists)

    def _mapped(self, setting: ClickSetting, name: str, rows: int, full: Full, seed: int) -> MappedTable:
        config = self._config(setting, seed)
        stats = self._stats(name, full)
        id_map = build_map(stats, rows, config)
        start = None
        if setting.method in WARM and setting.start == "full":
            weights = self.counts[name] ** (0.0 if config.method == "cluster" else config.count_exponent)
            start = shared_rows(id_map, full.weights[name], weights[:, None], name)
        product = config.method == "quotient-remainder" and setting.operation == "product"
        return MappedTable(id_map.num_rows, self.dim, id_map, product=product, start=start)

    def _stats(self, name: str, full: Full) -> TableStats:
        vectors = full.scaled[name]
        return TableStats(name=name, num_ids=len(vectors), counts=self.counts[name], embedding=vectors)

    def _config(self, setting: ClickSetting, seed: int) -> HashConfig:
        two_rows = setting.method == "learned-2"
        config = HashConfig(
            method=cast(HashMethod, "learned" if two_rows else setting.method),
            rows_per_id=2 if two_rows else 1,
            row_weights=setting.weighted,
            count_exponent=setting.count_exponent,
            seed=seed,
        )
        if setting.method in ("frequency", "hybrid"):
            return replace(config, exclusive_share=setting.exclusive_share)
        return config


def _hot(setting: ClickSetting, rows: int) -> int:
    """Hot rows of a table with CAFE; at least one row is shared."""
    return rows - max(1, round(setting.shared * rows)) if setting.method == "cafe" else 0


def _map_size(setting: ClickSetting, ids: int, rows: int) -> tuple[int, int]:
    """(bits as stored, words of 32 bits at serving) of what finds the rows of the ids of one table."""
    if setting.method in ("frequency", "hybrid"):  # the list of the ids with exclusive rows
        exclusive = int(setting.exclusive_share * rows)
        return exclusive * _bits(ids), exclusive
    if setting.method == "cafe":
        hot = _hot(setting, rows)
        return 8 * SLOTS * SLOT_BYTES * hot, SLOTS * SLOT_BYTES // 4 * hot
    if setting.method == "cce":
        return ids * setting.chunks * _bits(rows // 2), ids * setting.chunks
    if setting.method in ("cluster", "learned"):
        return ids * _bits(rows), ids
    if setting.method == "learned-2":
        weights = 2 if setting.weighted else 0  # float16
        return ids * (2 * _bits(rows) + 16 * weights), (2 + weights // 2) * ids
    return 0, 0


def _bits(numbers: int) -> int:
    return max(1, (numbers - 1).bit_length())
