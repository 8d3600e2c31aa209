"""A saved model of `recpress train --model` -> a program from columns of the log to predictions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torchrec import EmbeddingBagCollection
from torchrec.modules.embedding_configs import PoolingType
from torchrec.modules.embedding_modules import get_embedding_names_by_table

from recpress.data.dataset import artifact
from recpress.data.dataset.log import SIDES, Log
from recpress.data.errors import InputError
from recpress.modules.frozen.kernel import STORAGE_OF, Storage
from recpress.modules.hashing.id_map import IdMap
from recpress.modules.row_source import round_up
from recpress.modules.serving.bags import BagOutput, ServedBags, ServedTable
from recpress.modules.serving.batch_model import PerIdLists, ServedColumn, ServedModel
from recpress.modules.serving.rows import narrower
from recpress.modules.serving.tower import PerId
from recpress.trainer.artifacts.id_maps import load_maps
from recpress.trainer.export.program import GOLDEN_ROWS, Input, Program, golden_ids
from recpress.trainer.export.shards import SavedTable
from recpress.trainer.export.tensors import ProgramTensors
from recpress.trainer.export.towers import dense_state, row_index
from recpress.trainer.features.feature_set import Feature, FeatureSet, FeatureTable
from recpress.trainer.features.saved import saved_features
from recpress.trainer.model.factory import factory_of
from recpress.trainer.model.inputs import ModelInputs
from recpress.trainer.model.saved import saved_options
from recpress.trainer.model.trained import refuse_sequences
from recpress.trainer.model.two_tower import MAPS, WEIGHTS

_PREFIX = "model."
"""Of the names in the weights: the trainer wraps the model (`trained.TrainedModel`)."""


def served_program(
    path: str, manifest: dict[str, Any], log: Log, tensors: ProgramTensors, storage: Storage, factory: str
) -> Program:
    """The program `model`.

    Args:
        factory: `pkg.module:make` of a model that is none of `MODELS`.

    Raises:
        InputError: the factory is not given; files are missing or do not fit the model.
    """
    saved = _Saved.open(path, manifest, log)
    name, options = saved_options(path, manifest, factory)
    module = factory_of(name)(options, ModelInputs.of(saved.features))
    refuse_sequences(name, module, "recpress export")
    _load_dense(path, module, saved.dense)
    for place, found in list(module.named_modules()):
        if isinstance(found, EmbeddingBagCollection):
            parent, _, attribute = place.rpartition(".")
            setattr(module.get_submodule(parent), attribute, saved.bags(place, found, tensors, storage))
    columns = [saved.column(feature, tensors) for feature in saved.features.features]
    inputs = saved.inputs()
    served = ServedModel(module, columns, [part.name for part in inputs]).eval()
    return Program("model", served, tensors, inputs, saved.golden(inputs), "predictions: probabilities of the label 1")


@dataclass(frozen=True)
class _Saved:
    """A model of labels, opened."""

    folder: Path
    model: Mapping[str, Any]
    log: Log
    features: FeatureSet
    maps: Mapping[str, IdMap]
    dense: Mapping[str, torch.Tensor]

    @classmethod
    def open(cls, path: str, manifest: dict[str, Any], log: Log) -> _Saved:
        folder = artifact.fetch(path, manifest, f"{WEIGHTS}/*", f"{MAPS}/*")
        names = [found.parent.name for found in sorted((folder / MAPS).glob("*/map.json"))]
        maps = load_maps(folder / MAPS, names, None)
        model = manifest["model"]
        features = saved_features(path, manifest, log)
        return cls(folder, model, log, features, maps, dense_state(folder / WEIGHTS))

    def bags(self, place: str, bags: EmbeddingBagCollection, tensors: ProgramTensors, storage: Storage) -> ServedBags:
        """The served tables of the collection at `place` in the model."""
        configs = bags.embedding_bag_configs()
        kinds = {feature.name: feature for feature in self.features.features}
        tables, outputs = {}, []
        for config, keys in zip(configs, get_embedding_names_by_table(configs), strict=True):
            tables[config.name] = self._table(place, config, tensors, storage)
            for key, name in zip(keys, config.feature_names, strict=True):
                feature = kinds[name]
                single = feature.kind in ("id", "bucketized")
                outputs.append(BagOutput(key, name, config.name, single, feature.config.max_length))
        dims = {config.name: config.embedding_dim for config in configs}
        return ServedBags(tables, outputs, dims, weighted=bags.is_weighted())

    def _table(self, place: str, config: Any, tensors: ProgramTensors, storage: Storage) -> ServedTable:
        name, weights = config.name, self.folder / WEIGHTS / "tables"
        trained = f"{_PREFIX}{place}.embedding_bags.{name}.weight"
        frozen = f"{_PREFIX}{place}.frozen.{name}.frozen"
        is_frozen = (weights / frozen).is_dir()
        stored = STORAGE_OF[config.data_type]
        if is_frozen:
            of_table = [f.config.storage for f in self.features.features if f.table == name and f.config.frozen]
            stored = next((found for found in of_table if found != "fp32"), "fp32")
        one = self.maps.get(name)
        rows = config.num_embeddings if one is None else one.num_rows
        width = round_up(config.embedding_dim) if is_frozen else config.embedding_dim
        table = SavedTable(weights / (frozen if is_frozen else trained), stored, rows, width)
        used = narrower(stored, storage)
        label = name if name not in tensors.tables else f"{place}.{name}"
        return ServedTable(
            row_index(config.num_embeddings, one, tensors, label),
            tensors.rows(label, used, rows, table.dim, table.blocks(used), table.take),
            mean=config.pooling == PoolingType.MEAN,
            dim=config.embedding_dim,
        )

    def column(self, feature: Feature, tensors: ProgramTensors) -> ServedColumn:
        """How a feature follows from the program's inputs."""
        listed, is_float = feature.kind in ("list", "sequence"), feature.kind == "float"
        numbers = self.features.numbers.get(feature.name)
        number = None if numbers is None else numbers.values if is_float else numbers.buckets
        if feature.source == "log":
            names = (f"{feature.column}.values", f"{feature.column}.lengths") if listed else (feature.column,)
            return ServedColumn(feature.name, names, number=number, is_float=is_float)
        return ServedColumn(
            feature.name,
            (self.log.column(feature.source),),
            of_id=self._of_id(feature, tensors),
            number=number,
            is_float=is_float,
        )

    def _of_id(self, feature: Feature, tensors: ProgramTensors) -> nn.Module:
        assert feature.source != "log"
        side, name = self.features.sides[feature.source], f"{feature.source}.{feature.column}"
        if feature.column in side.floats:
            values = side.floats[feature.column]
            return PerId(tensors.add(name, torch.cat([values, torch.full((1,), torch.nan)])), tensors.large)
        assert side.ids is not None
        found = side.ids.categorical[feature.column]
        if isinstance(found, torch.Tensor):
            unknown = torch.full((1,), -1)  # an unknown id of the feature's table
            return PerId(tensors.add(name, torch.cat([found, unknown]).int()), tensors.large)
        values, offsets = found
        ends = torch.cat([offsets, offsets[-1:]])
        return PerIdLists(
            tensors.add(f"{name}.values", values.int()), tensors.add(f"{name}.offsets", ends), tensors.large
        )

    def inputs(self) -> list[Input]:
        """The columns that the features need, each once."""
        found: dict[str, Input] = {}
        for feature in self.features.features:
            column = feature.column
            if feature.source != "log":
                column = self.log.column(feature.source)
                meaning = f"dense ids of {feature.source}s"
                found.setdefault(column, Input(column, torch.int64, meaning))
            elif feature.kind in ("float", "bucketized"):
                found.setdefault(column, Input(column, torch.float32, "numbers as in the log; NaN if missing"))
            elif feature.kind == "id":
                found.setdefault(column, Input(column, torch.int64, self._ids(column)))
            else:
                last = f"; the last {feature.config.max_length} of a list count" if feature.config.max_length else ""
                values = Input(f"{column}.values", torch.int64, f"{self._ids(column)} of all lists{last}", size=column)
                lengths = Input(f"{column}.lengths", torch.int64, "length of each list", values=column)
                found.setdefault(values.name, values)
                found.setdefault(lengths.name, lengths)
        return list(found.values())

    def _ids(self, column: str) -> str:
        if (found := self.log.hash_of(column)) is None:
            return "dense ids"
        return f"raw ids as hash_ids.py maps them to {found[1]}"

    def golden(self, inputs: list[Input]) -> list[torch.Tensor]:
        """Random values for the inputs, with unknown ids, missing numbers and empty lists."""
        generator = torch.Generator().manual_seed(0)
        num_ids = {feature.column: table.num_ids for feature, table in _with_tables(self.features)}
        num_ids |= {self.log.column(side): self.log.num_ids(side) for side in SIDES if self.log.column(side)}
        lengths = torch.randint(4, (GOLDEN_ROWS,), generator=generator)
        found = []
        for part in inputs:
            if part.values:
                found.append(lengths)
            elif part.size in num_ids and part.name.endswith(".values"):
                found.append(torch.randint(num_ids[part.size], (int(lengths.sum()),), generator=generator))
            elif part.dtype == torch.float32:
                numbers = 10 * torch.randn(GOLDEN_ROWS, generator=generator)
                found.append(numbers.masked_fill(torch.arange(GOLDEN_ROWS) % 8 == 0, torch.nan))
            else:
                found.append(golden_ids(num_ids[part.name], generator))
        return found


def _with_tables(features: FeatureSet) -> list[tuple[Feature, FeatureTable]]:
    of = {name: table for table in features.tables for name in table.features}
    return [(feature, of[feature.name]) for feature in features.features if feature.name in of]


def _load_dense(path: str, module: nn.Module, dense: Mapping[str, torch.Tensor]) -> None:
    """Fill all but the tables."""
    state = {name.removeprefix(_PREFIX): tensor for name, tensor in dense.items()}
    tables = {
        f"{place}.embedding_bags.{config.name}.weight"
        for place, found in module.named_modules()
        if isinstance(found, EmbeddingBagCollection)
        for config in found.embedding_bag_configs()
    }
    try:
        missing, unexpected = module.load_state_dict(state, strict=False, assign=True)
    except RuntimeError as error:
        raise InputError(f"{path}: its weights do not fit the model: {error}") from error
    if odd := sorted((set(missing) - tables) | set(unexpected)):
        raise InputError(f"{path}: tensor {odd[0]!r} is not in both the weights and the model; was its code changed?")
