"""What a training run starts from, and whether it fits together: factors, maps, cross-fitted or not, held-out rows."""

from __future__ import annotations

import logging

from recpress.data.config import SampleConfig
from recpress.data.dataset.log import Log
from recpress.data.errors import InputError
from recpress.trainer.artifacts.factors import FactorsArtifact, open_factors
from recpress.trainer.artifacts.id_maps import SIDES, HashArtifact, open_maps
from recpress.trainer.config import TrainConfig
from recpress.trainer.distributed.process_group import Ranks

logger = logging.getLogger(__name__)


def choose_factors(config: TrainConfig, log: Log) -> FactorsArtifact | None:
    """Those that the tables start from; None where they start at random. Raises InputError where they do not fit."""
    if config.model.tables.strategy == "random":
        if config.factors is not None:
            raise InputError("factors: given, but model.tables.strategy is 'random', which takes none")
        return None
    if config.factors is None:
        raise InputError(f"factors: missing; model.tables.strategy '{config.model.tables.strategy}' starts from them")
    return open_factors(config.factors, log)


def choose_maps(config: TrainConfig, log: Log, factors: FactorsArtifact | None) -> HashArtifact | None:
    """The maps that the tables lie behind, if any. Raises InputError where they do not fit the factors."""
    if config.hash is None:
        return None
    hashed = open_maps(config.hash, log)
    if not any(side in hashed.maps for side in SIDES):
        raise InputError(f"{config.hash}: maps {', '.join(hashed.maps)}, expected a map of users or items")
    for side in SIDES:
        rows = hashed.rows(side)
        if factors is not None and rows is not None and rows.shape[1] != factors.dim:
            raise InputError(
                f"{config.hash}: the vectors of the {side} rows have dimension {rows.shape[1]}, expected that of "
                f"{factors.path}, {factors.dim}"
            )
    return hashed


def choose_crossfit(config: TrainConfig, log: Log, factors: FactorsArtifact | None) -> bool:
    """Whether to train on factors that have not seen the sample."""
    if config.crossfit == "no" or factors is None:
        return False
    frozen = config.model.tables.strategy.startswith("frozen")
    fits = factors.has_not_seen(log, config.sample)
    if config.crossfit == "yes" and not (frozen and fits):
        drawn = f"{config.sample}" if log.sample_of is None else f"{config.sample} of {log.path}, itself a sample"
        want = f"factors made without this very sample ({drawn})" if frozen else "frozen tables"
        raise InputError(f"crossfit: expected {want}; {factors.path} was made without {factors.crossfit}")
    return frozen and fits


def choose_sample(config: TrainConfig, log: Log, factors: FactorsArtifact | None) -> SampleConfig:
    """The rows to train on: as asked, else the default of --sample.rate. `config` is resolved.

    With frozen factors that is the sample that the cross-fitted ones have not seen, or a tenth of the rows; otherwise,
    and of a log that is a sample already, all rows.
    """
    asked = config.sample
    if asked.rate:
        return SampleConfig(kind=asked.kind, rate=asked.rate, seed=asked.seed)
    if factors is None or not config.model.tables.strategy.startswith("frozen") or log.is_part:
        return SampleConfig(kind=asked.kind, rate=1.0, seed=asked.seed)
    unseen, plain = factors.crossfit, SampleConfig()
    untouched = (asked.kind, asked.seed) == (plain.kind, plain.seed)
    if unseen is not None and (untouched or (asked.kind, asked.seed) == (unseen.kind, unseen.seed)):
        return unseen
    return SampleConfig(kind=asked.kind, rate=0.1, seed=asked.seed)


def has_heldout(config: TrainConfig, log: Log, ranks: Ranks) -> bool:
    """Whether the log has held-out rows to rank at the end."""
    if log.test is None and log.test_negatives is None:
        return False
    if log.is_part and log.test_negatives is None and config.evaluation.protocol == "auto":
        if ranks.rank == 0:
            logger.info(
                "%s is a sample: held-out rows are ranked by `recpress evaluate` on the log that it is of", log.path
            )
        return False  # `load_heldout` says why
    return True
