"""A model of labels as tables without memory for TorchRec's planner, and the activations of a step."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import nn
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor, KeyedTensor
from torchrec.datasets.utils import Batch
from torchrec.modules.embedding_modules import get_embedding_names_by_table

from recpress.data.errors import InputError
from recpress.modules.frozen.collection import FrozenEmbeddingBagCollection
from recpress.modules.frozen.kernel import FrozenTable
from recpress.modules.row_source import round_up
from recpress.trainer.model.factory import factory_of
from recpress.trainer.model.inputs import ModelInputs
from recpress.trainer.model.trained import check_tables, refuse_sequences
from recpress.trainer.plan.job import MapShape
from recpress.trainer.plan.label_job import LabelJob
from recpress.trainer.plan.meta_model import PeakBytes, Shard

logger = logging.getLogger(__name__)
_BATCHES = (64, 128)
"""The activations of two small batches give those of any."""


class MetaLabelled(nn.Module):
    """The model of a job: its tables on the device "meta", hashed and frozen as in training, and its dense part."""

    def __init__(self, job: LabelJob) -> None:
        """
        Raises:
            InputError: the factory does not return a model, or its tables do not fit the features.
        """
        super().__init__()
        name, inputs = job.config.factory, ModelInputs.of(job.features)
        model = factory_of(name)(job.config.model, inputs)
        if not isinstance(model, nn.Module):
            raise InputError(f"--model {name}: returned {type(model).__name__}, expected an nn.Module")
        check_tables(name, model, job.features)
        refuse_sequences(name, model, "recpress plan")
        self.maps: dict[str, MapShape] = {}
        """Of the tables of the model."""
        self.collections = nn.ModuleList()
        looked_up: list[_LookedUp] = []
        for path, found in list(model.named_modules()):
            if not isinstance(found, EmbeddingBagCollection):
                continue
            for table in found.embedding_bag_configs():
                if table.name in job.maps:
                    self.maps[table.name] = job.maps[table.name]
            self.collections += _collections(found, job)
            looked_up.append(_LookedUp(found))
            if not path:
                model = looked_up[-1]
                continue
            parent, _, attribute = path.rpartition(".")
            setattr(model.get_submodule(parent), attribute, looked_up[-1])
        self.model = model
        self.activations = _activation_bytes(name, model, looked_up, job)
        """Peak bytes of a step of one rank."""

    def dense(self) -> list[nn.Parameter]:
        """Trained parameters that are replicated on every rank."""
        return list(self.model.parameters())

    def table_shards(self) -> Iterator[Shard]:
        """Each table as a single shard."""
        for found in self.collections:
            if isinstance(found, FrozenEmbeddingBagCollection):
                for t in found.tables():
                    yield Shard(t.name, "", t.rows, t.dim, t.storage, len(t.features))
            elif isinstance(found, EmbeddingBagCollection):
                for c in found.embedding_bag_configs():
                    yield Shard(c.name, "", c.num_embeddings, c.embedding_dim, None, len(c.feature_names))


def _collections(bags: EmbeddingBagCollection, job: LabelJob) -> list[nn.Module]:
    """The trainable and the frozen tables of a collection, with the rows that `compress` gives them."""
    meta = torch.device("meta")
    tables = {table.name: table for table in job.features.tables}
    frozen, trained = [], []
    for config in bags.embedding_bag_configs():
        rows = job.maps[config.name].num_rows if config.name in job.maps else config.num_embeddings
        of = tables.get(config.name)
        if of is not None and of.frozen is not None:
            dim, features = round_up(config.embedding_dim), tuple(config.feature_names)
            frozen.append(FrozenTable(name=config.name, rows=rows, dim=dim, features=features, storage=of.storage))
        else:
            trained.append(replace(config, num_embeddings=rows))
    found: list[nn.Module] = []
    if trained:
        found.append(EmbeddingBagCollection(trained, device=meta))
    if frozen:
        found.append(FrozenEmbeddingBagCollection(frozen, meta))
    return found


class _LookedUp(nn.Module):
    """In place of a collection: its looked-up vectors, which `resize` creates."""

    def __init__(self, bags: EmbeddingBagCollection) -> None:
        super().__init__()
        self._configs, self._weighted = bags.embedding_bag_configs(), bags.is_weighted()
        self._keys = [name for names in get_embedding_names_by_table(self._configs) for name in names]
        self._dims = [config.embedding_dim for config in self._configs for _ in config.feature_names]
        self._values = torch.empty(0)

    def resize(self, rows: int) -> None:
        self._values = torch.zeros(rows, sum(self._dims), requires_grad=True)

    def embedding_bag_configs(self) -> list[EmbeddingBagConfig]:
        return self._configs

    def is_weighted(self) -> bool:
        return self._weighted

    def forward(self, features: KeyedJaggedTensor) -> KeyedTensor:
        return KeyedTensor(self._keys, self._dims, self._values)


def _activation_bytes(name: str, model: nn.Module, looked_up: list[_LookedUp], job: LabelJob) -> int:
    """Peak bytes of tensors in forward and backward of the dense part, from two small batches."""
    try:
        small, large = (_peak(model, looked_up, job, rows) for rows in _BATCHES)
    except Exception as error:
        reason = str(error).strip().splitlines()
        logger.warning(
            "--model %s: its step could not be run without tables (%s%s), so that activations are not counted",
            name,
            type(error).__name__,
            f": {reason[0]}" if reason else "",
        )
        return 0
    each = (large - small) / (_BATCHES[1] - _BATCHES[0])
    return max(0, round(small + each * (job.batch_size - _BATCHES[0])))


def _peak(model: nn.Module, looked_up: list[_LookedUp], job: LabelJob, rows: int) -> int:
    keys = job.features.keys
    for part in looked_up:
        part.resize(rows)
    one_each = torch.ones(len(keys) * rows, dtype=torch.int64)
    batch = Batch(
        dense_features=torch.zeros(rows, len(job.features.floats)),
        sparse_features=KeyedJaggedTensor(keys, torch.zeros_like(one_each), lengths=one_each),
        labels=torch.zeros(rows),
    )
    with PeakBytes() as tracked:
        loss, _ = model(batch)
        loss.backward()
    model.zero_grad(set_to_none=True)
    return tracked.peak
