"""The sharded two-tower network of a log, with its features; `train` trains it, `evaluate` ranks with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torchrec.distributed.model_parallel import DistributedModelParallel

from recpress.data.config import SampleConfig
from recpress.data.dataset import artifact
from recpress.data.dataset.log import SIDES, Log, Side
from recpress.data.dataset.side_table import SideTable
from recpress.data.errors import InputError
from recpress.data.negatives.samplers import Negatives, UniformNegatives
from recpress.data.sampling.histories import latest_items
from recpress.data.sampling.selection import HoldOut
from recpress.data.stream.batch import ITEM, USER, BatchBuilder
from recpress.modules.config import HISTORY, LossConfig, TablesConfig, TowersConfig, TwoTowerConfig
from recpress.modules.hashing.id_map import IdMap
from recpress.modules.row_source import LogCounts
from recpress.modules.two_tower.model import SideSpec, TwoTower
from recpress.trainer.artifacts.factors import MODEL, FactorsArtifact, check_vocabulary
from recpress.trainer.artifacts.id_maps import HashArtifact, load_maps
from recpress.trainer.config import CommunicationConfig, TableOptimizer
from recpress.trainer.config_file import current_names
from recpress.trainer.distributed.process_group import Ranks
from recpress.trainer.distributed.rank_errors import raise_on_all_ranks
from recpress.trainer.model.sharding import FP32, shard
from recpress.trainer.model.vectors import VectorFn
from recpress.trainer.model.weights import load_weights

WEIGHTS = "weights"
MAPS = "maps"
"""Folder of the id maps, inside a model."""


@dataclass(frozen=True)
class Features:
    """Feature tables of users and items, replicated on every rank."""

    user: SideTable | None
    """With the feature `HISTORY`, if the model uses the items of users."""
    item: SideTable | None

    @classmethod
    def of(cls, log: Log, user: Sequence[str], item: Sequence[str]) -> Features:
        """These columns of `users.parquet` and `items.parquet`. Raises InputError if one is missing."""
        return cls(_side_table(log, "user", user), _side_table(log, "item", item))

    def with_histories(
        self,
        log: Log,
        tables: TablesConfig,
        *,
        sample: SampleConfig | None = None,
        hold_out: HoldOut | None = None,
    ) -> Features:
        """These features, with the items of users if the tables need them; see `latest_items`."""
        if tables.history == "none":
            return self
        known = self.user or SideTable(log.num_users, {}, [], None)
        found = latest_items(log, tables.history_length, sample=sample, hold_out=hold_out)
        lists = torch.from_numpy(found.values), torch.from_numpy(found.offsets)
        return replace(self, user=replace(known, categorical={**known.categorical, HISTORY: lists}))


@dataclass
class ShardedTwoTower:
    """A two-tower network under DistributedModelParallel, with the builder of its batches."""

    dmp: DistributedModelParallel
    builder: BatchBuilder

    @property
    def module(self) -> TwoTower:
        module = self.dmp.module
        return module.module if isinstance(module, torch.nn.parallel.DistributedDataParallel) else module

    def vectors(self, side: Side) -> VectorFn:
        """Function from ids to vectors, in eval mode. Collective: every rank calls it equally often."""
        features = self.builder.users if side == "user" else self.builder.items
        lookup = self.module.user_vectors if side == "user" else self.module.item_vectors

        def vectors(ids: torch.Tensor) -> torch.Tensor:
            return lookup(*features(ids)).float()

        return vectors

    def load_factors(
        self, factors: FactorsArtifact, *, crossfit: bool = False, hashed: HashArtifact | None = None
    ) -> None:
        """Fill the tables of ids and of log counts, each rank its own shards. Collective.

        A row of a table with an id map is the best fit to the factors of the ids that share it, weighted by count.

        Args:
            crossfit: use the factors that have not seen a sample; scale their counts to those of all rows.
            hashed: the artifact of the id maps. Its row vectors are used directly, except with `crossfit`, because
                they have seen the sample.

        Raises:
            ValueError: a shard is missing or corrupt; shapes do not fit.
        """
        mapped = [side for side in SIDES if getattr(self.module, side).map is not None]
        with raise_on_all_ranks():  # a rank that cannot open them is not in the collectives that follow
            counts = [factors.counts(side, crossfit=crossfit) if side in mapped else None for side in SIDES]
            given = [hashed.rows(side) if hashed and side in mapped and not crossfit else None for side in SIDES]
            tables = [factors.table(side, crossfit=crossfit) for side in SIDES]
        self.module.load_factors(*tables, counts=counts, rows=given)
        if not self.module.item.counted:
            return
        logs = [LogCounts(factors.counts(side)) for side in SIDES]
        if crossfit and factors.crossfit is not None:
            share = 1.0 - factors.crossfit.rate
            logs = [
                LogCounts(factors.counts(side, crossfit=True), share=share, like=like)
                for side, like in zip(SIDES, logs, strict=True)
            ]
        self.module.load_counts(*logs)


def build(
    config: TwoTowerConfig,
    log: Log,
    features: Features,
    ranks: Ranks,
    *,
    dim: int | None,
    negatives: Negatives,
    shared_negatives: bool = False,
    item_counts: Any = None,
    batch_size: int,
    table_learning_rate: float,
    table_optimizer: TableOptimizer = "row-wise-adagrad",
    seed: int,
    maps: Mapping[str, IdMap] | None = None,
    communication: CommunicationConfig = FP32,
) -> ShardedTwoTower:
    """A network with random weights, sharded by TorchRec's planner. Collective.

    Args:
        dim: dimension of the factors; None for `random`.
        batch_size: rows of a batch per rank, for the planner.
        maps: "user", "item" -> id map of the tables of this side.
        communication: precision of vectors and gradients between ranks.

    Raises:
        InputError: a strategy that needs factors without them; tables that do not fit in memory.
    """
    torch.manual_seed(seed)
    with raise_on_all_ranks():
        users, items = (side_spec(config, log, side, dim, features, (maps or {}).get(side)) for side in SIDES)
        module = TwoTower(config, users, items, tables_device="meta")
    dmp = shard(
        module,
        ranks.device,
        batch_size=batch_size,
        learning_rate=table_learning_rate,
        optimizer=table_optimizer,
        seed=seed,
        communication=communication,
    )
    builder = BatchBuilder(
        negatives,
        shared=shared_negatives,
        item_counts=item_counts,
        user_table=features.user,
        item_table=features.item,
        device=ranks.device,
        history=None if config.tables.history == "none" else HISTORY,
    )
    return ShardedTwoTower(dmp, builder)


def describe_model(
    config: TwoTowerConfig, dim: int | None, user: Sequence[str], item: Sequence[str], maps: Sequence[str] = ()
) -> dict[str, Any]:
    """Entry of the manifest about a model, from which `load_model` builds it."""
    return {
        "two_tower": asdict(config),
        "dim": dim,
        "user_features": list(user),
        "item_features": list(item),
        "maps": list(maps),
    }


def load_model(path: str, log: Log, ranks: Ranks) -> ShardedTwoTower:
    """The model that `recpress train` wrote to `path`, sharded over these ranks, in eval mode. Collective.

    Raises:
        InputError: no such model, another vocabulary, a corrupt file. On every rank.
    """
    with raise_on_all_ranks():
        manifest = artifact.read_manifest(path, MODEL)
        check_vocabulary(path, manifest, log)
        model = manifest["model"]
        config = saved_config(path, model)
        features = Features.of(log, model["user_features"], model["item_features"])
        features = features.with_histories(log, config.tables)
        folder = artifact.fetch(path, manifest, f"{WEIGHTS}/*", f"{MAPS}/*")
        maps = load_maps(folder / MAPS, model.get("maps", ()), log)
    sharded = build(
        config,
        log,
        features,
        ranks,
        dim=model["dim"],
        negatives=UniformNegatives(log.num_items, 1),
        batch_size=1024,
        table_learning_rate=0.0,
        seed=0,
        maps=maps,
    )
    with raise_on_all_ranks():
        load_weights(sharded.dmp, folder / WEIGHTS)
    sharded.dmp.eval()
    return sharded


def saved_config(path: str, model: Mapping[str, Any]) -> TwoTowerConfig:
    """The configuration in the manifest entry of `describe_model`. Raises InputError if there is none."""
    try:
        parts = current_names(model["two_tower"])
        parts["towers"]["hidden"] = tuple(parts["towers"]["hidden"])
        return TwoTowerConfig(
            tables=TablesConfig(**parts["tables"]),
            towers=TowersConfig(**parts["towers"]),
            loss=LossConfig(**parts["loss"]),
        )
    except (KeyError, TypeError) as error:
        raise InputError(f"{path}: its manifest does not describe a model of this release: {error}") from error


def _side_table(log: Log, side: Side, names: Sequence[str]) -> SideTable | None:
    if not names:
        return None
    table = log.features(side)
    where = f"{log.path}/{side}s.parquet"
    if table is None:
        raise InputError(f"{where}: missing; expected it for the {side} features {', '.join(names)}")
    floats = set(SideTable.from_arrow(table, categorical=(), where=where).float_names)
    return SideTable.from_arrow(
        table, [name for name in names if name not in floats], [name for name in names if name in floats], where
    )


def side_spec(
    config: TwoTowerConfig, log: Log, side: Side, dim: int | None, features: Features, id_map: IdMap | None
) -> SideSpec:
    """The sizes of one side, with the features of its table."""
    table = features.user if side == "user" else features.item
    values = {} if table is None else {name: n for name, n in table.num_values().items() if name != HISTORY}
    history = log.num_items if side == "user" and config.tables.history != "none" else 0
    return SideSpec(
        key=USER if side == "user" else ITEM,
        rows=log.num_ids(side),
        dim=dim,
        counted=is_counted(config, side, dim),
        categorical=values,
        floats=0 if table is None else len(table.float_names),
        history=history,
        map=id_map,
    )


def is_counted(config: TwoTowerConfig, side: Side, dim: int | None) -> bool:
    """Whether the tower gets the log count of an id."""
    per_id = side == "item" or config.tables.history != "only"
    return dim is not None and config.towers.kind == "residual" and per_id
