"""Any model in the train loop: the protocol of models, their checks, and their sharding.

A model is an `nn.Module` whose forward maps a batch (TorchRec's `Batch`: `dense_features` (B, F), `sparse_features`
with a key per feature, `labels` (B,)) to (loss (), probabilities (B,)). Its embedding tables are in
EmbeddingBagCollections and EmbeddingCollections, which DistributedModelParallel shards; the rest is replicated.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torchrec import EmbeddingBagCollection, EmbeddingCollection
from torchrec.datasets.utils import Batch
from torchrec.distributed.model_parallel import DistributedModelParallel

from recpress.data.errors import InputError
from recpress.modules.compression.replace import compress
from recpress.modules.compression.report import CompressReport
from recpress.modules.frozen.kernel import HasFrozenTables, row_bytes
from recpress.modules.two_tower.predictions import ObservedLoss, Predictions
from recpress.trainer.config import CommunicationConfig, TableOptimizer
from recpress.trainer.distributed.process_group import Ranks
from recpress.trainer.distributed.rank_errors import raise_on_all_ranks
from recpress.trainer.features.feature_set import FeatureSet
from recpress.trainer.model.factory import factory_of
from recpress.trainer.model.inputs import ModelInputs
from recpress.trainer.model.sharding import FP32, shard

TOLERANCE = 1e-3
"""Probabilities may exceed [0, 1] by rounding."""


class TrainedModel(ObservedLoss):
    """A model as `fit` trains it: (loss, detached loss); in eval mode (loss, probabilities)."""

    def __init__(self, model: nn.Module, name: str) -> None:
        super().__init__()
        self.model, self.name = model, name
        self._range_checked = False

    def forward(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        found = self.model(batch)
        if not (isinstance(found, tuple) and len(found) == 2):
            raise InputError(
                f"--model {self.name}: its forward returned {type(found).__name__}, expected (loss, predictions)"
            )
        loss, predictions = found
        if any(isinstance(part, torch.fx.Proxy) for part in (loss, predictions, batch.labels)):
            return found  # a train pipeline traces the model
        self._check(loss, predictions, batch.labels)
        if self.observes(predictions):
            assert self.observer is not None
            probability = predictions.detach().float()
            self.observer(Predictions(probability, batch.labels, torch.ones_like(probability)))
        return loss, loss.detach() if self.training else predictions

    def _check(self, loss: Any, predictions: Any, labels: torch.Tensor) -> None:
        for what, tensor, shape in (("loss", loss, torch.Size()), ("predictions", predictions, labels.shape)):
            if not isinstance(tensor, torch.Tensor) or tensor.shape != shape:
                given = tuple(tensor.shape) if isinstance(tensor, torch.Tensor) else type(tensor).__name__
                raise InputError(f"--model {self.name}: its {what} are {given}, expected a tensor {tuple(shape)}")
        if self.training and torch.is_grad_enabled() and not loss.requires_grad:
            raise InputError(f"--model {self.name}: its loss has no gradient, expected one that depends on the batch")
        if self._range_checked or not predictions.numel():
            return
        self._range_checked = True  # once, because it waits for the device; `BinaryMetrics` checks held-out rows
        low, high = torch.stack(predictions.detach().aminmax()).tolist()
        if low < -TOLERANCE or high > 1 + TOLERANCE:
            raise InputError(
                f"--model {self.name}: its predictions are in [{low:.4g}, {high:.4g}], expected probabilities in "
                "[0, 1], such as the sigmoid of logits"
            )


@dataclass(frozen=True)
class ShardedModel:
    """A model under DistributedModelParallel."""

    dmp: DistributedModelParallel
    table_bytes: dict[str, int]
    """Of each embedding table as stored, without optimizer state."""
    table_features: dict[str, list[str]]
    """Table -> the features that look it up."""

    @property
    def module(self) -> TrainedModel:
        module = self.dmp.module
        return module.module if isinstance(module, nn.parallel.DistributedDataParallel) else module


def build_model(
    name: str,
    config: Any,
    features: FeatureSet,
    ranks: Ranks,
    *,
    batch_size: int,
    learning_rate: float,
    optimizer: TableOptimizer = "row-wise-adagrad",
    seed: int,
    rows_follow: bool = False,
    communication: CommunicationConfig = FP32,
) -> ShardedModel:
    """The model `name` with its tables hashed, frozen and sharded as the features say. Collective.

    Args:
        batch_size: rows of a batch per rank, for the planner.
        learning_rate, optimizer: of the tables.
        rows_follow: do not load frozen rows; the caller does.
        communication: precision of vectors and gradients between ranks.

    Raises:
        InputError: the factory does not return a model; its tables do not fit the features or the memory. On every
            rank.
    """
    torch.manual_seed(seed)
    report: CompressReport | None = None
    size: dict[str, int] = {}
    looked_up: dict[str, list[str]] = {}
    with raise_on_all_ranks():
        model = factory_of(name)(config, ModelInputs.of(features))
        if not isinstance(model, nn.Module):
            raise InputError(f"--model {name}: returned {type(model).__name__}, expected an nn.Module")
        looked_up = check_tables(name, model, features)
        model, report = _compressed(name, model, features)
        size = _table_bytes(model)
        if rows_follow:
            for module in model.modules():
                if isinstance(module, HasFrozenTables):
                    module.pending = None
    layouts = {table.name: table.sharding for table in features.tables if table.sharding != "auto"}
    dmp = shard(
        TrainedModel(model, name),
        ranks.device,
        batch_size=batch_size,
        learning_rate=learning_rate,
        optimizer=optimizer,
        learning_rates={t.name: t.learning_rate for t in features.tables if t.learning_rate is not None},
        sharding_types=layouts,
        seed=seed,
        communication=communication,
    )
    if report is not None and not rows_follow:
        with raise_on_all_ranks():
            report.load(dmp)
    return ShardedModel(dmp, size, looked_up)


def _compressed(name: str, model: nn.Module, features: FeatureSet) -> tuple[nn.Module, CompressReport | None]:
    """The model with maps and frozen tables, and what was compressed, if anything was."""
    maps = {table.name: table.id_map for table in features.tables if table.id_map is not None}
    frozen = {t.name: t.frozen.table(t.side) for t in features.tables if t.frozen is not None and t.side is not None}
    if not maps and not frozen:
        return model, None
    storages = {table.storage for table in features.tables if table.frozen is not None} or {"fp32"}
    if len(storages) > 1:
        raise InputError(f"features: frozen tables have storage {' and '.join(sorted(storages))}, expected one of them")
    counts = {
        t.name: torch.from_numpy(np.array(t.frozen.counts(t.side)[:])[:, 0])
        for t in features.tables
        if t.frozen is not None and t.side is not None and t.name in maps
    }
    try:
        return compress(model, maps, frozen, counts=counts, warm_start=False, storage=storages.pop())
    except ValueError as error:
        raise InputError(f"--model {name}: {error}") from error


def check_tables(name: str, model: nn.Module, features: FeatureSet) -> dict[str, list[str]]:
    """The features of each table. Raises InputError if the tables of a model do not fit the features."""
    found: dict[str, list[str]] = {}
    ids = {feature: table.num_ids for table in features.tables for feature in table.features}
    layouts = {table.name: table.sharding for table in features.tables}
    in_sequences: set[str] = set()
    for module in model.modules():
        if not isinstance(module, EmbeddingBagCollection | EmbeddingCollection):
            continue
        of_sequences = isinstance(module, EmbeddingCollection)
        for table in module.embedding_configs() if of_sequences else module.embedding_bag_configs():
            where = f"--model {name}: table '{table.name}'"
            if table.name in found and (of_sequences or table.name in in_sequences):
                raise InputError(
                    f"{where} is in an EmbeddingCollection and in another collection, which would not share its rows; "
                    "expected all its features in one of them"
                )
            if of_sequences and layouts.get(table.name) == "table_row_wise":
                raise InputError(f"{where} is in an EmbeddingCollection, which cannot be sharded table_row_wise")
            if of_sequences:
                in_sequences.add(table.name)
            found[table.name] = list(table.feature_names)
            if not table.feature_names:
                raise InputError(f"{where} has no feature, expected at least one of {', '.join(ids)}")
            for feature in table.feature_names:
                if feature not in ids:
                    raise InputError(f"{where} takes the feature '{feature}', expected one of {', '.join(ids)}")
                if table.num_embeddings < ids[feature]:
                    raise InputError(
                        f"{where} has {table.num_embeddings:,} rows, but the feature '{feature}' has "
                        f"{ids[feature]:,} ids"
                    )
    if not found:
        raise InputError(
            f"--model {name}: has no EmbeddingBagCollection and no EmbeddingCollection, expected at least one table"
        )
    return found


def refuse_sequences(name: str, model: nn.Module, what: str) -> None:
    """Raise InputError if a model has an EmbeddingCollection, which `what` does not know."""
    if any(isinstance(module, EmbeddingCollection) for module in model.modules()):
        raise InputError(f"--model {name}: has an EmbeddingCollection, and {what} knows EmbeddingBagCollections only")


def _table_bytes(model: nn.Module) -> dict[str, int]:
    """Bytes of each embedding table as stored, without optimizer state."""
    found: dict[str, int] = {}
    for module in model.modules():
        if isinstance(module, HasFrozenTables):
            found |= {t.name: t.rows * row_bytes(t.storage, t.dim) for t in module.tables()}
        elif isinstance(module, EmbeddingBagCollection):
            found |= {c.name: 4 * c.num_embeddings * c.embedding_dim for c in module.embedding_bag_configs()}
        elif isinstance(module, EmbeddingCollection):
            found |= {c.name: 4 * c.num_embeddings * c.embedding_dim for c in module.embedding_configs()}
    return found
