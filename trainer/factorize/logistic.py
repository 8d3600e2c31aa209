"""The logistic factorization, with the same stream, sharding and loop as the network."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch

from recpress.data.config import NegativesConfig, SampleConfig, StreamConfig
from recpress.data.dataset.log import Log
from recpress.data.negatives.samplers import Negatives, UniformNegatives, make_negatives
from recpress.data.stream.batch import ITEM, USER, Batch, BatchBuilder
from recpress.data.stream.loader import InteractionStream
from recpress.modules.als.factors import Factors
from recpress.modules.config import LogisticConfig
from recpress.modules.two_tower.logistic import LogisticMF
from recpress.modules.two_tower.model import SideSpec
from recpress.trainer.config import OptimizerConfig
from recpress.trainer.distributed.process_group import Ranks
from recpress.trainer.distributed.rank_errors import raise_on_all_ranks
from recpress.trainer.loop.config import FitConfig
from recpress.trainer.loop.fit import fit
from recpress.trainer.loop.optimizer import TrainOptimizer
from recpress.trainer.model.sharding import shard
from recpress.trainer.model.vectors import tower_vectors

BIAS_RATE = 0.01
"""Adam's learning rate of the only parameter that is not in a table."""


def factorize_logistic(
    config: LogisticConfig,
    log: Log,
    ranks: Ranks,
    *,
    without: SampleConfig | None = None,
    batch_size: int = 4096,
    on_bad_file: Literal["stop", "skip"] = "stop",
    label: str | None = None,
) -> tuple[Factors, list[float]]:
    """Train on the rows of a log; return (factors that include the biases, mean cross-entropy per epoch). Collective.

    Args:
        without: skip the rows of this sample.
        batch_size: rows of a batch per rank.
        label: column of labels in [0, 1] to train on, in place of sampled negatives.
        on_bad_file: `skip` replaces rows that cannot be read by rows of other row groups.

    Raises:
        InputError: the log or the settings cannot be used; a loss is not finite.
    """
    with raise_on_all_ranks():
        stream = InteractionStream(
            log.train,
            log.schema,
            StreamConfig(batch_size=batch_size, seed=config.seed, on_bad_file=on_bad_file),
            sample=without,
            complement=without is not None,
            rank=ranks.rank,
            world=ranks.world_size,
            columns=[log.schema.user, log.schema.item, *([label] if label else [])],
        )
        if label is None:
            sampled = NegativesConfig(kind="uniform", count=config.negatives, seed=config.seed)
            negatives: Negatives = make_negatives(sampled, log.num_items)
        else:
            negatives = UniformNegatives(log.num_items, 0)
        builder = BatchBuilder(negatives, device=ranks.device)
    torch.manual_seed(config.seed)
    model = LogisticMF(
        config,
        SideSpec(key=USER, rows=log.num_users),
        SideSpec(key=ITEM, rows=log.num_items),
        tables_device="meta",
    )
    dmp = shard(model, ranks.device, batch_size=batch_size, learning_rate=config.learning_rate, seed=config.seed)
    steps = stream.steps_per_epoch
    optimizer = TrainOptimizer(dmp, OptimizerConfig(dense="adam", learning_rate=BIAS_RATE), steps * config.epochs)

    def batches(epoch: int, first_step: int) -> Iterator[Batch]:
        stream.set_epoch(epoch, first_step)
        return map(builder, stream)

    result = fit(
        dmp,
        optimizer,
        batches,
        FitConfig(epochs=config.epochs, log_every=steps),
        device=ranks.device,
        description="logistic",
    )
    dmp.eval()
    module = dmp.module
    assert isinstance(module, LogisticMF)
    users, items = (tower_vectors(module, side, device=ranks.device) for side in ("user", "item"))
    factors = Factors(
        users=users,
        items=items,
        num_users=log.num_users,
        num_items=log.num_items,
        rank=ranks.rank,
        world=ranks.world_size,
    )
    return factors, result.losses
