"""The collections that `compress` puts in place of TorchRec's."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn
from torchrec import EmbeddingBagCollection, EmbeddingCollection, JaggedTensor, KeyedJaggedTensor, KeyedTensor
from torchrec.distributed.quant_state import ShardedQuantEmbeddingModuleState
from torchrec.distributed.types import ShardedModule
from torchrec.modules.embedding_configs import EmbeddingBagConfig, EmbeddingConfig, PoolingType
from torchrec.modules.embedding_modules import get_embedding_names_by_table
from torchrec.modules.fp_embedding_modules import FeatureProcessedEmbeddingBagCollection
from torchrec.optim.fused import FusedOptimizerModule
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizer

from recpress.modules.frozen.collection import FrozenEmbeddingBagCollection
from recpress.modules.frozen.operators import one_stride
from recpress.modules.frozen.sequence import FrozenEmbeddingCollection
from recpress.modules.hashing.learned_hash import LearnedHash
from recpress.modules.row_source import RowSource, load_rows

PENDING, LOADED = "_recpress_rows", "_recpress_loaded"
"""Attributes of a trainable collection: rows to load when it is sharded, and whether its sharded version has them."""


class Compressed(FusedOptimizerModule):
    """Base of the collections: maps, trainable tables and frozen tables, under the names of the original collection.

    The trainable tables are in a submodule of TorchRec's type, so that TorchRec's sharders, quantization and fused
    optimizers find them. `state_dict` and the fused optimizer name them as before: `embedding_bags.<table>.weight`.
    """

    hashes: LearnedHash | None
    trainable: Any
    frozen: Any
    _configs: list[Any]
    _device: torch.device

    def init_names(self, group: str, old_rows: dict[str, int], must_load: bool) -> None:
        """Call this at the end of `__init__`.

        Args:
            group: name of the dictionary of tables in a state dict, such as `embedding_bags`.
            old_rows: table with a map -> its rows before.
            must_load: the trainable tables start from rows that sharding must not lose.
        """
        self._group, self._old_rows, self._must_load = group, old_rows, must_load
        self.register_load_state_dict_post_hook(_name_missing)

    def tables_module(self) -> Any:
        """The collection of the trainable tables, plain or sharded."""
        return self.trainable

    def tables(self) -> list[str]:
        return [config.name for config in self._configs]

    def frozen_tables(self) -> list[str]:
        return [] if self.frozen is None else [t.name for t in self.frozen.tables()]

    @property
    def device(self) -> torch.device:
        return self._device

    @property
    def fused_optimizer(self) -> KeyedOptimizer:
        """That of the sharded tables, so that its keys have the names of `state_dict`."""
        if isinstance(self.trainable, FusedOptimizerModule):
            return self.trainable.fused_optimizer
        return CombinedOptimizer([])

    def reset_parameters(self) -> None:
        """The submodules do this."""

    def load(self, table: str, source: RowSource) -> None:
        """Load a table, plain or sharded, from its new rows (num_rows, dim)."""
        if table in self.frozen_tables():
            self.frozen.load(table, source)
        else:
            load_rows(self.weight(table), table, source)
            setattr(self.tables_module(), LOADED, True)

    def weight(self, table: str) -> Any:
        """The weight of a trainable table: a tensor or a ShardedTensor."""
        return self.tables_module().state_dict()[f"{self._group.rpartition('.')[2]}.{table}.weight"]

    def check_rows(self) -> None:
        """Raise ValueError if the rows to start from were lost in sharding."""
        quantized = isinstance(self.trainable, ShardedQuantEmbeddingModuleState)  # after it was loaded
        if self._must_load and isinstance(self.trainable, ShardedModule) and not quantized:
            tables = self.tables_module()
            if not getattr(tables, LOADED, False):
                name = next(c.name for c in self._configs if c.name not in self.frozen_tables())
                raise ValueError(
                    f"table {name!r}: sharding has discarded the rows that `compress` computed; pass "
                    "`sharders=recpress.modules.sharders()` to DistributedModelParallel, which load them, or call "
                    "`report.load(model)` or `model.load_state_dict` after it; `compress(..., warm_start=False)` "
                    "starts from random rows"
                )
            self._must_load = False

    def state_dict(self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        base: Any = super()
        found = base.state_dict(*args, destination=destination, prefix=prefix, keep_vars=keep_vars)
        inner = f"{prefix}trainable."
        for key in [key for key in found if key.startswith(inner)]:
            found[prefix + key[len(inner) :]] = found.pop(key)
        return found

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        own = tuple(f"{prefix}{name}." for name in ("hashes", "frozen", "trainable"))
        for key in [k for k in state_dict if k.startswith(prefix) and not k.startswith(own)]:
            value = state_dict.pop(key)
            table = key.removesuffix(".weight").rpartition(".")[2]
            old = self._old_rows.get(table)
            if old is not None and value.size(0) == old:
                if strict:
                    error_msgs.append(
                        f"table {table!r}: the checkpoint has its {old} rows from before `compress`; pass them as "
                        "`rows` of `compress`"
                    )
                continue  # a missing key
            state_dict[f"{prefix}trainable.{key[len(prefix) :]}"] = value
        if any(key.startswith(f"{prefix}trainable.") for key in state_dict):
            setattr(self.tables_module(), LOADED, True)
        base: Any = super()
        base._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )


def _name_missing(module: Any, incompatible: Any) -> None:
    """Missing keys under their names in `state_dict`."""
    for keys in (incompatible.missing_keys, incompatible.unexpected_keys):
        for name in dict(module.trainable.named_children()) if module.trainable is not None else ():
            keys[:] = [key.replace(f"trainable.{name}.", f"{name}.") for key in keys]


class CompressedEmbeddingBagCollection(Compressed, EmbeddingBagCollection):
    """Replaces an EmbeddingBagCollection: maps ids, looks up trainable and frozen tables, and joins the results.

    `embedding_bags` holds the trainable tables.
    """

    def __init__(
        self,
        configs: list[EmbeddingBagConfig],
        hashes: LearnedHash | None,
        trainable: EmbeddingBagCollection | None,
        frozen: FrozenEmbeddingBagCollection | None,
        device: torch.device,
        *,
        old_rows: dict[str, int] | None = None,
        must_load: bool = False,
    ) -> None:
        """configs: all tables in their original order, with their new numbers of rows."""
        nn.Module.__init__(self)  # not that of EmbeddingBagCollection, which creates tables
        self.hashes, self.trainable, self.frozen = hashes, trainable, frozen
        self._configs, self._device = configs, device
        self._is_weighted = (trainable is not None and trainable.is_weighted()) or (
            frozen is not None and frozen.weighted
        )
        names = set(self.frozen_tables())
        kept = [c for c in configs if c.name not in names]
        frozen_features = [f for c in configs if c.name in names for f in c.feature_names]
        part_names = dict(zip([c.name for c in kept], get_embedding_names_by_table(kept), strict=True))
        # Per output: key, dimension, whether it is frozen, its key in that part, the feature whose length divides it.
        self._outputs: list[tuple[str, int, bool, str, str]] = []
        for config, own in zip(configs, get_embedding_names_by_table(configs), strict=True):
            is_frozen = config.name in names
            for index, (name, feature) in enumerate(zip(own, config.feature_names, strict=True)):
                if is_frozen:
                    inner = f"{feature}@{config.name}" if frozen_features.count(feature) > 1 else feature
                else:
                    inner = part_names[config.name][index]
                divide = feature if is_frozen and config.pooling == PoolingType.MEAN else ""
                self._outputs.append((name, config.embedding_dim, is_frozen, inner, divide))
        self.init_names("embedding_bags", old_rows or {}, must_load)

    def forward(self, features: KeyedJaggedTensor) -> KeyedTensor:
        """As the forward of the EmbeddingBagCollection."""
        self.check_rows()
        if self.hashes is not None:
            features = self.hashes(features)
        if self.frozen is None:
            return self.trainable(features)
        frozen = self.frozen(features)
        trained = None if self.trainable is None else self.trainable(features)
        return _join(frozen, trained, features, self._outputs)

    @property
    def embedding_bags(self) -> nn.ModuleDict:
        """The trainable tables."""
        return nn.ModuleDict() if self.trainable is None else self.trainable.embedding_bags

    def embedding_bag_configs(self) -> list[EmbeddingBagConfig]:
        """All tables in their original order, with their new numbers of rows."""
        _refuse_fusing(self)
        return self._configs


class CompressedEmbeddingCollection(Compressed, EmbeddingCollection):
    """Replaces an EmbeddingCollection: maps ids, looks up trainable and frozen tables, and adds the rows of an id.

    `embeddings` holds the trainable tables.
    """

    def __init__(
        self,
        configs: list[EmbeddingConfig],
        hashes: LearnedHash | None,
        trainable: EmbeddingCollection | None,
        frozen: FrozenEmbeddingCollection | None,
        device: torch.device,
        *,
        need_indices: bool = False,
        old_rows: dict[str, int] | None = None,
        must_load: bool = False,
    ) -> None:
        """configs: all tables in their original order, with their new numbers of rows."""
        nn.Module.__init__(self)  # not that of EmbeddingCollection, which creates tables
        self.hashes, self.trainable, self.frozen = hashes, trainable, frozen
        self._configs, self._device, self._need_indices = configs, device, need_indices
        self._names = get_embedding_names_by_table(configs)
        parts: dict[bool, list[Any]] = {True: [], False: []}
        frozen_names = set(self.frozen_tables())
        for config in configs:
            parts[config.name in frozen_names].append(config)
        inner = {
            config.name: names
            for part in parts.values()
            for config, names in zip(part, get_embedding_names_by_table(part), strict=True)
        }
        # Per output: key, dimension, whether it is frozen, its key in that part, its feature, rows per id.
        self._outputs = [
            (name, config.embedding_dim, config.name in frozen_names, part, feature,
             1 if hashes is None else hashes.rows_per_id(feature))
            for config, names in zip(configs, self._names, strict=True)
            for name, part, feature in zip(names, inner[config.name], config.feature_names, strict=True)
        ]  # fmt: skip
        self.init_names("embeddings", old_rows or {}, must_load)

    def forward(self, features: KeyedJaggedTensor) -> dict[str, JaggedTensor]:
        """As the forward of the EmbeddingCollection."""
        self.check_rows()
        mapped = features if self.hashes is None else self.hashes(features)
        frozen = None if self.frozen is None else self.frozen(mapped)
        trained = None if self.trainable is None else self.trainable(mapped)
        return join_sequences(frozen, trained, features, mapped, *self.join_options())

    def join_options(
        self, all_trainable: bool = False
    ) -> tuple[list[tuple[str, int, bool, str, str, int]], bool, bool]:
        """The arguments of `join_sequences` after the parts.

        Args:
            all_trainable: for one collection of all tables, in which none is frozen.
        """
        outputs = self._outputs
        if all_trainable:
            outputs = [(name, dim, False, name, feature, count) for name, dim, _, _, feature, count in outputs]
        return outputs, isinstance(self.hashes, UnweightedHash), self._need_indices

    @property
    def embeddings(self) -> nn.ModuleDict:
        """The trainable tables."""
        return nn.ModuleDict() if self.trainable is None else self.trainable.embeddings

    def embedding_configs(self) -> list[EmbeddingConfig]:
        """All tables in their original order, with their new numbers of rows."""
        _refuse_fusing(self)
        return self._configs

    def embedding_dim(self) -> int:
        return self._configs[0].embedding_dim

    def embedding_names_by_table(self) -> list[list[str]]:
        return self._names

    def need_indices(self) -> bool:
        return self._need_indices

    def use_gather_select(self) -> bool:
        return self.trainable is not None and self.trainable.use_gather_select()


class CompressedFeatureProcessed(Compressed, nn.Module):
    """Replaces a FeatureProcessedEmbeddingBagCollection: maps ids before it, because positions do not depend on ids."""

    frozen = None

    def __init__(
        self,
        hashes: LearnedHash,
        trainable: FeatureProcessedEmbeddingBagCollection,
        *,
        old_rows: dict[str, int],
        must_load: bool = False,
    ) -> None:
        super().__init__()
        self.hashes, self.trainable = hashes, trainable
        tables = trainable._embedding_bag_collection
        self._configs, self._device = tables.embedding_bag_configs(), tables.device
        self.init_names("_embedding_bag_collection.embedding_bags", old_rows, must_load)

    def forward(self, features: KeyedJaggedTensor) -> KeyedTensor:
        """As the forward of the FeatureProcessedEmbeddingBagCollection."""
        self.check_rows()
        assert self.hashes is not None
        return self.trainable(self.hashes(features))

    def tables_module(self) -> Any:
        return self.trainable._embedding_bag_collection

    def embedding_bag_configs(self) -> list[EmbeddingBagConfig]:
        return self._configs

    def is_weighted(self) -> bool:
        return True


def _refuse_fusing(module: Any) -> None:
    """`fuse_embedding_optimizer` makes new collections from the configs. It would drop maps and frozen rows."""
    if sys._getframe(2).f_globals.get("__name__") == "torchrec.modules.fused_embedding_modules":
        raise ValueError(
            f"table {module.tables()[0]!r}: fuse_embedding_optimizer would drop the maps and frozen tables of "
            f"{type(module).__name__}; apply it to its submodule `trainable` instead"
        )


class UnweightedHash(LearnedHash):
    """For unweighted collections behind a weighted map: ignores the weights of the batch, and uses those of the map."""

    uses_batch_weights = False


@torch.fx.wrap
def _join(
    frozen: KeyedTensor,
    trained: KeyedTensor | None,
    features: KeyedJaggedTensor,
    outputs: list[tuple[str, int, bool, str, str]],
) -> KeyedTensor:
    """Columns of both parts in the order of `outputs`. A leaf of torch.fx that TorchScript compiles."""
    values: list[torch.Tensor] = []
    divided = [output[4] != "" for output in outputs]
    if any(divided):
        features = one_stride(features)
    for _, dim, is_frozen, name, divide in outputs:
        if is_frozen:
            value = frozen[name]
        else:
            assert trained is not None
            value = trained[name]
        if value.shape[1] != dim:  # the dimension of a frozen table is padded
            value = value[:, :dim]
        if divide != "":
            value = value / features.to_dict()[divide].lengths().clamp_min(1)[:, None]
        values.append(value)
    return KeyedTensor([o[0] for o in outputs], [o[1] for o in outputs], torch.cat(values, 1))


@torch.fx.wrap
def join_sequences(
    frozen: dict[str, JaggedTensor] | None,
    trained: dict[str, JaggedTensor] | None,
    features: KeyedJaggedTensor,
    mapped: KeyedJaggedTensor,
    outputs: list[tuple[str, int, bool, str, str, int]],
    weighted: bool,
    need_indices: bool,
) -> dict[str, JaggedTensor]:
    """One vector per id of `features`, from the rows that `mapped` looked up. As `_join`."""
    found: dict[str, JaggedTensor] = {}
    batch = features.to_dict()
    entries = mapped.to_dict() if weighted else batch
    for name, dim, is_frozen, part_name, feature, rows_per_id in outputs:
        if is_frozen:
            assert frozen is not None
            rows = frozen[part_name].values()
        else:
            assert trained is not None
            rows = trained[part_name].values()
        ids = batch[feature]
        if rows.shape[1] != dim:
            rows = rows[:, :dim]
        if weighted:  # by the maps; those of the batch are ignored, as in an EmbeddingCollection
            rows = rows * entries[feature].weights()[:, None]
        if rows_per_id > 1:
            rows = rows.view(-1, rows_per_id, dim).sum(1)
        indices: torch.Tensor | None = None
        if need_indices:
            indices = ids.values()
        found[name] = JaggedTensor(rows, lengths=ids.lengths(), weights=indices)
    return found
