"""A saved two-tower network, or factors -> the served towers of users and items."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torchrec.modules.embedding_configs import DataType
from torchrec.modules.embedding_modules import get_embedding_names_by_table

from recpress.data.dataset import artifact
from recpress.data.dataset.log import Log, Side
from recpress.data.dataset.side_table import SideTable
from recpress.data.errors import InputError
from recpress.modules.frozen.kernel import STORAGE_OF, Storage
from recpress.modules.hashing.id_map import IdMap
from recpress.modules.row_source import blocks, round_up
from recpress.modules.serving.bags import ServedTable
from recpress.modules.serving.row_index import IndexPlan, RowIndex, packed_words
from recpress.modules.serving.rows import encoded_parts, narrower
from recpress.modules.serving.tower import History, LookUp, PerId, ServedCounts, ServedFeature, ServedTower
from recpress.modules.two_tower.model import SideSpec, make_side
from recpress.modules.two_tower.towers import ResidualTower, Tower
from recpress.trainer.artifacts.factors import FactorsArtifact
from recpress.trainer.artifacts.id_maps import load_maps
from recpress.trainer.export.shards import SavedTable
from recpress.trainer.export.tensors import Parts, ProgramTensors
from recpress.trainer.model.two_tower import MAPS, WEIGHTS, Features, saved_config, side_spec


@dataclass(frozen=True)
class SavedTwoTower:
    """A model of `recpress train`, opened."""

    folder: Path
    """With the weights and maps."""
    manifest: Mapping[str, Any]
    log: Log
    features: Features
    maps: Mapping[str, IdMap]
    dense: Mapping[str, torch.Tensor]
    """The replicated part of the state."""

    @classmethod
    def open(cls, path: str, manifest: dict[str, Any], log: Log) -> SavedTwoTower:
        """Open the model at `path`. Raises InputError if a file is missing or corrupt."""
        model = manifest["model"]
        folder = artifact.fetch(path, manifest, f"{WEIGHTS}/*", f"{MAPS}/*")
        return cls(
            folder,
            manifest,
            log,
            Features.of(log, model["user_features"], model["item_features"]),
            load_maps(folder / MAPS, model.get("maps", ()), log),
            dense_state(folder / WEIGHTS),
        )


def dense_state(weights: Path) -> dict[str, torch.Tensor]:
    """The replicated part of a saved model. Raises InputError if it cannot be read."""
    path = weights / "dense.pt"
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        raise InputError(f"{path}: not the weights of a model ({type(error).__name__}: {error})") from error


def served_tower(saved: SavedTwoTower, side: Side, tensors: ProgramTensors, storage: Storage) -> ServedTower:
    """The tower of one side.

    A model that is the factorization's own ranking (`fallback`) needs no tower: its vectors are the rows of the id
    table.
    """
    model = saved.manifest["model"]
    config = saved_config(str(saved.folder), model)
    table = saved.features.user if side == "user" else saved.features.item
    spec = side_spec(config, saved.log, side, model["dim"], saved.features, saved.maps.get(side))
    builder = _Side(saved, side, spec, table, tensors, storage)
    frozen, trained, tower = make_side(side, config, spec, torch.device("meta"))
    fallback = bool(saved.manifest.get("fallback"))
    look_ups, history = [], None
    for where, collection in (("frozen", frozen), ("tables", trained)):
        if collection is None or (fallback and where == "tables"):
            continue
        tables = collection.embedding_bag_configs()
        for found, names in zip(tables, get_embedding_names_by_table(tables), strict=True):
            if found.name == f"{side}_history" and not fallback:
                rows = builder.history(where, found)
                history = History(where, names[0], rows, config.tables.history_length)  # type: ignore[arg-type]
            elif not (fallback and found.name != side):
                look_ups.append(LookUp(where, names[0], builder.look_up(where, found)))  # type: ignore[arg-type]
    if fallback:
        return ServedTower(look_ups, None).eval()
    _load(tower, saved.dense, f"{side}_tower.")
    codes = builder.count_codes() if spec.counted and spec.map is not None else None
    floats = builder.floats() if spec.floats else None
    return ServedTower(look_ups, tower, count=codes, floats=floats, history=history).eval()


def served_factors(factors: FactorsArtifact, side: Side, tensors: ProgramTensors, storage: Storage) -> ServedTower:
    """Factors as a tower: the vectors are the rows."""
    source = factors.table(side)
    rows, dim = source.shape[0], round_up(source.shape[1])

    def parts() -> Iterator[Parts]:
        for _, block in blocks(source, side, (0, rows), (0, dim)):
            yield encoded_parts(block, storage, side)

    def exact(index: torch.Tensor) -> torch.Tensor:
        known = index < rows
        found = torch.zeros(len(index), dim)
        found[known, : source.shape[1]] = torch.from_numpy(source[index[known].numpy()])
        return found

    held = tensors.rows(side, storage, rows, dim, parts(), exact)
    table = ServedTable(RowIndex(IndexPlan.of(rows, None), tensors.large), held)
    return ServedTower([LookUp("frozen", side, table)], None).eval()


def row_index(num_ids: int, id_map: IdMap | None, tensors: ProgramTensors, name: str) -> RowIndex:
    """How the ids of a table become rows. Tables with the same map share it."""
    plan = IndexPlan.of(num_ids, id_map)
    if id_map is None:
        return RowIndex(plan, tensors.large)
    if id_map not in tensors.indexes:
        words = tensors.add(f"{name}.map", packed_words(id_map, plan)) if plan.needs_words else None
        weights = None if id_map.weights is None else tensors.add(f"{name}.map_weights", id_map.weights)
        tensors.indexes[id_map] = RowIndex(plan, tensors.large, words, weights)
    return tensors.indexes[id_map]


class _Side:
    """Builds the look-ups of one side."""

    def __init__(
        self,
        saved: SavedTwoTower,
        side: Side,
        spec: SideSpec,
        table: SideTable | None,
        tensors: ProgramTensors,
        storage: Storage,
    ) -> None:
        self.saved, self.side, self.spec, self.table = saved, side, spec, table
        self.tensors, self.storage = tensors, storage

    def look_up(self, where: str, config: Any) -> nn.Module:
        """ids -> the output of a table."""
        name, feature = config.name, config.feature_names[0]
        table = self._saved(where, config)
        if name == f"{self.side}_count":
            return self._counts(table)
        if feature in self.spec.categorical:
            return self._feature(feature, table)
        storage = narrower(table.storage, self.storage)
        index = row_index(self.spec.rows, self.spec.map, self.tensors, name)
        rows = self.tensors.rows(name, storage, table.rows, table.dim, table.blocks(storage), table.take)
        return ServedTable(index, rows)

    def history(self, where: str, config: Any) -> ServedTable:
        """The table of the items of users."""
        table = self._saved(where, config)
        storage = narrower(table.storage, self.storage)
        index = RowIndex(IndexPlan.of(table.rows, None), self.tensors.large)
        return ServedTable(
            index, self.tensors.rows(config.name, storage, table.rows, table.dim, table.blocks(storage), table.take)
        )

    def count_codes(self) -> ServedCounts:
        """The log counts of ids with a map."""
        codes, (low, step) = (self.saved.dense[f"{self.side}_counts.{name}"] for name in ("codes", "span"))
        values = torch.cat([codes, codes.new_zeros(1)])  # the smallest for unknown ids
        return ServedCounts(self._per_id("counts", values), float(low), float(step))

    def floats(self) -> PerId:
        assert self.table is not None
        assert self.table.floats is not None
        return self._per_id("floats", torch.cat([self.table.floats, torch.zeros(1, self.spec.floats)]))

    def _per_id(self, name: str, values: torch.Tensor) -> PerId:
        return PerId(self.tensors.add(f"{self.side}.{name}", values), self.tensors.large)

    def _saved(self, where: str, config: Any) -> SavedTable:
        names = {
            "frozen": f"{self.side}_frozen.{config.name}.frozen",
            "tables": f"{self.side}_tables.embedding_bags.{config.name}.weight",
        }
        storage = STORAGE_OF[config.data_type] if where == "frozen" else STORAGE_OF[DataType.FP32]
        folder = self.saved.folder / WEIGHTS / "tables" / names[where]
        return SavedTable(folder, storage, config.num_embeddings, config.embedding_dim)

    def _counts(self, table: SavedTable) -> ServedCounts:
        values = table.first_column()
        return ServedCounts(self._per_id("counts", torch.cat([values, values.min()[None]])))

    def _feature(self, name: str, table: SavedTable) -> nn.Module:
        """A categorical feature: the row of its value or, for lists, the sum of their rows, computed now."""
        assert self.table is not None
        values, storage = self.table.categorical[name], narrower(table.storage, self.storage)
        if isinstance(values, torch.Tensor):
            of_id = torch.cat([values, torch.tensor([table.rows])]).int()
            held = table.blocks(storage)
            rows = self.tensors.rows(f"{self.side}_{name}", storage, table.rows, table.dim, held, table.take)
            return ServedFeature(self._per_id(name, of_id), rows)
        ids, floats = self.spec.rows, table.floats()
        parts = (encoded_parts(block, storage, name) for block in _list_sums(*values, floats))

        def exact(index: torch.Tensor) -> torch.Tensor:
            found = torch.zeros(len(index), table.dim)
            for place, row in enumerate(index.tolist()):
                if row < ids:
                    found[place] = floats[values[0][values[1][row] : values[1][row + 1]]].sum(0)
            return found

        rows = self.tensors.rows(f"{self.side}_{name}", storage, ids, table.dim, parts, exact)
        return ServedTable(RowIndex(IndexPlan.of(ids, None), self.tensors.large), rows)


def _list_sums(values: torch.Tensor, offsets: torch.Tensor, rows: torch.Tensor) -> Iterator[torch.Tensor]:
    """Blocks of the sums of the rows of each list: (b, dim)."""
    step = 1 << 16
    for first in range(0, len(offsets) - 1, step):
        part = offsets[first : first + step + 1]
        yield nn.functional.embedding_bag(
            values[part[0] : part[-1]], rows, part - part[0], mode="sum", include_last_offset=True
        )


def _load(tower: Tower | ResidualTower, dense: Mapping[str, torch.Tensor], prefix: str) -> None:
    state = {name.removeprefix(prefix): tensor for name, tensor in dense.items() if name.startswith(prefix)}
    try:
        tower.load_state_dict(state)
    except RuntimeError as error:
        raise InputError(f"the weights of the model do not fit its configuration: {error}") from error
