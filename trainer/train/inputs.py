"""The inputs of a training run, opened and checked against each other: log, factors, id maps, features, stream."""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass, replace
from typing import Any

from recpress.data.config import SampleConfig
from recpress.data.dataset import artifact
from recpress.data.dataset.log import SIDES, Log, Side
from recpress.data.errors import InputError
from recpress.data.stream.loader import InteractionStream
from recpress.modules.hashing.id_map import IdMap
from recpress.trainer.artifacts.factors import MODEL, FactorsArtifact, describe_log, open_factors
from recpress.trainer.artifacts.id_maps import HashArtifact, open_maps
from recpress.trainer.config import TrainConfig, chosen_schema
from recpress.trainer.distributed.process_group import Ranks
from recpress.trainer.distributed.rank_errors import raise_on_all_ranks
from recpress.trainer.features.id_space import IdSpace, side_space, with_map
from recpress.trainer.model.two_tower import Features, describe_model
from recpress.trainer.open_log import open_on_all_ranks
from recpress.trainer.train.data import make_stream
from recpress.trainer.train.online import first_round
from recpress.trainer.train.resume import checkpoint_folder
from recpress.trainer.train.validation import plan_hold_out
from recpress.trainer.train.warm_start import NewTable, describe_spaces

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Inputs:
    """What `open_inputs` opened."""

    given: TrainConfig
    """The configuration as the user gave it."""
    config: TrainConfig
    """The configuration with all defaults filled in."""
    log: Log
    stream: InteractionStream
    features: Features
    """Without the validation rows in the items of users."""
    factors: FactorsArtifact | None
    """Initial tables; None for random tables."""
    crossfit: bool
    """Whether to train on the factors that have not seen the sample."""
    hashed: HashArtifact | None

    @property
    def maps(self) -> dict[str, IdMap]:
        """ "user", "item" -> id map, of the sides that have one."""
        return {side: self.hashed.map(side) for side in SIDES if side in self.hashed.maps} if self.hashed else {}

    @property
    def starts_as_factors(self) -> bool:
        """Whether a network can rank as the factorization does."""
        return self.factors is not None and self.config.model.tables.history != "only"

    def tables(self) -> dict[str, NewTable]:
        """Name of each table of ids -> what its rows are of."""
        found: dict[str, NewTable] = {}
        strategy, history, factors = self.config.model.tables.strategy, self.config.model.tables.history, self.factors
        rows_of: dict[str, Side] = {} if history == "only" else {"user": "user"}
        rows_of |= {"item": "item"} if history == "none" else {"user_history": "item", "item": "item"}
        for name, side in rows_of.items():
            id_map = self.maps.get(name)
            space = with_map(side_space(self.log, side), side, id_map)
            found[name] = NewTable(space, id_map)
            if factors is not None and strategy == "warm-start":
                found[name] = NewTable(space, id_map, factors.table(side))
            elif factors is not None:
                found[name] = NewTable(replace(space, factors=factors.fingerprint), id_map)
            if strategy == "frozen+residual" and name == side:
                found[f"{side}_plus"] = NewTable(space, id_map)
        for side, features in zip(SIDES, (self.features.user, self.features.item), strict=True):
            for name, values in (features.num_values() if features is not None else {}).items():
                found.setdefault(f"{side}_{name}", NewTable(IdSpace(num_ids=values)))
        return found

    def describe(self) -> dict[str, Any]:
        """Entries of the manifest."""
        config = self.config
        dim = self.factors.dim if self.factors else None
        return {
            "log": describe_log(self.log),
            "ids": describe_spaces(self.log, {name: table.space for name, table in self.tables().items()}),
            "config": asdict(self.given),  # `recpress pipeline` compares it
            "resolved": asdict(config),
            "model": describe_model(config.model, dim, config.user_features, config.item_features, [*self.maps]),
            **({"hash": self.hashed.describe()} if self.hashed else {}),
        }


def open_inputs(given: TrainConfig, ranks: Ranks) -> Inputs:
    """Open all inputs, and check `given.out`. Collective.

    Raises:
        InputError: an input is missing, corrupt, or does not fit the others; `out` exists. On every rank.
    """
    config = given.resolved()
    only = first_round(config, checkpoint_folder(config)) if config.follow.online else None
    skip = config.stream.on_bad_file == "skip"
    log = open_on_all_ranks(config.data, chosen_schema(config.schema), skip=skip, only=only)
    with raise_on_all_ranks():
        factors = choose_factors(config, log)
        config = replace(config, sample=choose_sample(config, log, factors))
        hold_out, tables = plan_hold_out(config, log), config.model.tables
        features = Features.of(log, config.user_features, config.item_features)
        inputs = Inputs(
            given,
            config,
            log,
            stream=make_stream(config, log, ranks, hold_out=hold_out),
            features=features.with_histories(log, tables, sample=config.sample, hold_out=hold_out),
            factors=factors,
            crossfit=choose_crossfit(config, log, factors),
            hashed=choose_maps(config, log, factors),
        )
        sources = [path for path in (config.data, config.factors, config.hash, config.warm_start) if path]
        artifact.check_target(config.out, config.overwrite, MODEL, sources)
    if ranks.rank == 0:
        _log_settings(inputs)
    return inputs


def choose_factors(config: TrainConfig, log: Log) -> FactorsArtifact | None:
    """The initial tables; None for random tables. Raises InputError if they do not fit the log."""
    strategy = config.model.tables.strategy
    if strategy == "random":
        if config.factors is not None:
            raise InputError("factors: given, but model.tables.strategy is 'random', which takes none")
        return None
    if config.factors is None:
        raise InputError(f"factors: missing; model.tables.strategy '{strategy}' starts from them")
    return open_factors(config.factors, log)


def choose_sample(config: TrainConfig, log: Log, factors: FactorsArtifact | None) -> SampleConfig:
    """The configured sample, or the default of --sample.rate. `config` is resolved.

    With frozen factors the default is the sample that the cross-fitted factors have not seen, or a tenth of the rows.
    Otherwise, and for a log that is already a sample, it is all rows.
    """
    given = config.sample
    if given.rate:
        return SampleConfig(kind=given.kind, rate=given.rate, seed=given.seed)
    if factors is None or not config.model.tables.strategy.startswith("frozen") or log.is_part:
        return SampleConfig(kind=given.kind, rate=1.0, seed=given.seed)
    unseen, default = factors.crossfit, SampleConfig()
    unchanged = (given.kind, given.seed) == (default.kind, default.seed)
    if unseen is not None and (unchanged or (given.kind, given.seed) == (unseen.kind, unseen.seed)):
        return unseen
    return SampleConfig(kind=given.kind, rate=0.1, seed=given.seed)


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


def choose_maps(config: TrainConfig, log: Log, factors: FactorsArtifact | None) -> HashArtifact | None:
    """The id maps of the tables, if any. Raises InputError if they do not fit the factors."""
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
        made_from = hashed.manifest.get("factors")
        if factors is not None and rows is not None and made_from not in (None, factors.fingerprint):
            raise InputError(
                f"{config.hash}: the vectors of the {side} rows were made from other factors "
                f"({hashed.manifest['config']['factors']}) than {factors.path}; their spaces differ. Run "
                f"`recpress hash` with --factors {factors.path}"
            )
    return hashed


def has_heldout(config: TrainConfig, log: Log, ranks: Ranks) -> bool:
    """Whether the log has held-out rows to rank at the end."""
    if log.test is None and log.test_negatives is None:
        return False
    if log.is_part and log.test_negatives is None and config.evaluation.protocol == "auto":
        if ranks.rank == 0:
            logger.info(
                "%s is a sample: held-out rows are ranked by `recpress evaluate` on the log that it is of", log.path
            )
        return False  # `load_heldout` raises, with the reason
    return True


def _log_settings(inputs: Inputs) -> None:
    """Log which settings were chosen by default."""
    given, config, log = inputs.given, inputs.config, inputs.log
    rows = inputs.stream.num_rows
    share = "all rows" if config.sample.rate == 1 else f"{100 * config.sample.rate:g} % of the rows"
    start = f"factors {config.factors}" if config.factors else "random weights"
    defaults = [] if given.sample.rate else ["--sample.rate"]
    defaults += ["--model.tables.strategy"] if given.model.tables.strategy != config.model.tables.strategy else []
    logger.info(
        f"tables: {config.model.tables.strategy}, from {start}; {share}, {rows:,} to train on; up to "
        f"{config.epochs} epochs" + (f" (chosen by default: {', '.join(defaults)})" if defaults else "")
    )
    if log.is_part and config.sample.rate < 1:
        logger.info(
            f"{config.data} is a sample already, of which this trains on {rows:,} of {log.train.num_rows:,} rows; "
            "--sample.rate 1 takes all of it"
        )
