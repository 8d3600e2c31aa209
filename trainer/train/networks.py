"""The networks of a training run: the one that it trains, and one that ranks as the factorization does."""

from __future__ import annotations

from dataclasses import dataclass, replace

from recpress.data.errors import InputError
from recpress.data.negatives.samplers import InteractionSet, make_negatives
from recpress.modules.config import TwoTowerConfig
from recpress.trainer.distributed.process_group import Ranks
from recpress.trainer.distributed.rank_errors import raise_on_all_ranks
from recpress.trainer.model.two_tower import ShardedTwoTower, build
from recpress.trainer.train.inputs import Inputs


@dataclass(frozen=True)
class Networks:
    """Builds sharded networks for the inputs of a run. Every method is collective."""

    inputs: Inputs
    ranks: Ranks

    def build(self, model: TwoTowerConfig) -> ShardedTwoTower:
        """A network with random weights.

        Raises:
            InputError: settings that do not fit each other; tables that do not fit in memory. On every rank.
        """
        config, log, factors = self.inputs.config, self.inputs.log, self.inputs.factors
        loss, kind = model.loss, config.negatives.kind
        with raise_on_all_ranks():
            if kind == "in-batch" and not (loss.kind == "softmax" and loss.in_batch):
                raise InputError(
                    "negatives.kind is 'in-batch': expected model.loss.kind 'softmax' and model.loss.in_batch"
                )
            counts = log.counts("item") if loss.in_batch or kind != "uniform" else None
            reject = None
            size = {"rows": log.train.num_rows, "users": log.num_users, "items": log.num_items}
            if config.negatives.rejects(**size, sample=config.sample):
                reject = InteractionSet.of([log.train], log.schema.user, log.schema.item, log.num_items)
            negatives = make_negatives(config.negatives, log.num_items, counts, reject)
        return build(
            model,
            log,
            self.inputs.features,
            self.ranks,
            dim=factors.dim if factors else None,
            negatives=negatives,
            shared_negatives=config.negatives.shared,
            item_counts=counts,
            batch_size=config.stream.batch_size,
            table_learning_rate=config.optimizer.table_learning_rate,
            table_optimizer=config.optimizer.tables,
            seed=config.seed,
            maps=self.inputs.maps,
            communication=config.communication,
        )

    def load_factors(self, model: ShardedTwoTower, *, crossfit: bool) -> None:
        """Fill the tables with the factors, if there are any.

        Args:
            crossfit: take the factors that have not seen the sample (to train on), else those of all rows (to rank
                with).
        """
        if self.inputs.factors is not None:
            with raise_on_all_ranks():
                model.load_factors(self.inputs.factors, crossfit=crossfit, hashed=self.inputs.hashed)

    def residual(self) -> TwoTowerConfig:
        """The configuration of the model with residual towers, which start with the factorization's own ranking."""
        model = self.inputs.config.model
        return replace(model, towers=replace(model.towers, kind="residual"))

    def like_factorization(self, *, crossfit: bool) -> ShardedTwoTower:
        """A network that ranks as the factors do, in eval mode."""
        model = self.build(self.residual())
        self.load_factors(model, crossfit=crossfit)
        model.dmp.eval()
        return model
