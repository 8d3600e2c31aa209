"""`recpress tune --train.model`: settings of a model of labels, chosen on validation rows within a budget of time."""

from __future__ import annotations

import shutil
import time
from contextlib import ExitStack
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, cast

import numpy as np
import torch.distributed as dist

from recpress.data.config import Schema
from recpress.data.errors import InputError
from recpress.trainer.distributed.process_group import process_group
from recpress.trainer.distributed.rank_errors import raise_on_all_ranks
from recpress.trainer.train.config import TrainModelConfig
from recpress.trainer.train.model_stage import train_model
from recpress.trainer.tune.config import TuneModelConfig
from recpress.trainer.tune.search import open_folder, search, write

EPOCHS = (2, 3, 5, 8, 12)
LEARNING_RATES = (3e-4, 1e-3, 3e-3, 1e-2)
TABLE_LEARNING_RATES = (0.01, 0.02, 0.05, 0.1, 0.2)
DROPOUTS = (0.0, 0.1, 0.2, 0.3, 0.5)
_OF_A_RUN = ("data", "out", "factory", "model", "features", "checkpoint", "watch", "profile", "device", "tensorboard")
"""Options of `train` that the file does not have, or has in another form."""


@dataclass(frozen=True)
class LabelTrial:
    """The settings of a model that are varied."""

    epochs: int
    learning_rate: float
    table_learning_rate: float
    dropout: float | None
    """None: the model has none."""

    def __str__(self) -> str:
        rates = f"learning rate {self.learning_rate:g}, of tables {self.table_learning_rate:g}"
        dropout = "" if self.dropout is None else f", dropout {self.dropout:g}"
        return f"{self.epochs} epochs, {rates}{dropout}"

    def applied(self, given: TrainModelConfig) -> TrainModelConfig:
        """The run with these settings."""
        rates: dict[str, Any] = {"learning_rate": self.learning_rate, "table_learning_rate": self.table_learning_rate}
        model = given.model if self.dropout is None else replace(given.model, dropout=self.dropout)
        return replace(given, epochs=self.epochs, optimizer=replace(given.optimizer, **rates), model=model)


@dataclass
class TuneModelResult:
    """The content of the TOML file, and the trials, best first."""

    settings: dict[str, Any]
    trials: list[tuple[LabelTrial, float]]


def tune_model(config: TuneModelConfig) -> TuneModelResult:
    """Train models that differ in epochs, learning rates and dropout, and write the best settings to `config.out`.
    Collective.

    Each trial is scored by `train.evaluation.metric` of its published weights on validation rows. The test part chooses
    nothing.

    Raises:
        InputError: the log or the settings cannot be used; there are no validation rows; `out` exists. On every rank;
            nothing is written.
    """
    began = time.monotonic()
    metric = config.train.evaluation.metric
    with process_group(config.device) as ranks, ExitStack() as stack:
        folder = open_folder(config, ranks, stack)
        given = replace(
            config.train,
            data=config.data,
            schema=config.schema if config.train.schema == Schema() else config.train.schema,
            tensorboard=False,
            device=config.device,
        )

        def score(number: int, trial: LabelTrial) -> float:
            out = f"{folder}/model-{number}"
            trained = train_model(trial.applied(replace(given, out=out)))
            if ranks.rank == 0:
                shutil.rmtree(out, ignore_errors=True)
            with raise_on_all_ranks():
                if metric not in trained.validation:
                    raise InputError(
                        f"{config.data}: no validation rows with both labels, on which tune chooses by {metric}; "
                        "expected a val part, or more rows"
                    )
            return trained.validation[metric]

        found = search(
            config,
            label_candidates(config),
            score,
            began=began,
            metric=metric,
            smaller_is_better=metric != "AUC",
        )
        best, value = found[0]
        settings = {"train": _settings(best.applied(replace(given, data="", device="auto")))}
        with raise_on_all_ranks():
            if ranks.rank == 0:
                name = config.train.factory
                note = f" With --model {name}, --train.model {name} of a pipeline." if ":" in name else ""
                write(config.out, settings, found, note)
        dist.barrier()
        if ranks.rank == 0:
            print(f"{config.out}: {best}: {metric} {value:.4f}, best of {len(found)} networks", flush=True)
    return TuneModelResult(settings, found)


def label_candidates(config: TuneModelConfig) -> list[LabelTrial]:
    """The settings as given, then draws around them; a setting that differs from its default stays."""
    given, default = config.train, TrainModelConfig(data="", out="")
    options: Any = type(given.model)()
    dropout = getattr(given.model, "dropout", None)
    dropout = float(dropout) if isinstance(dropout, int | float) and not isinstance(dropout, bool) else None
    optimizer, rng = given.optimizer, np.random.default_rng(config.seed)
    found = [LabelTrial(given.epochs, optimizer.learning_rate, optimizer.table_learning_rate, dropout)]

    def drawn(value: Any, of_default: Any, choices: tuple[Any, ...]) -> Any:
        return type(choices[0])(rng.choice(choices)) if value == of_default else value

    for _ in range(20 * config.trials):
        trial = LabelTrial(
            epochs=drawn(given.epochs, default.epochs, EPOCHS),
            learning_rate=drawn(optimizer.learning_rate, default.optimizer.learning_rate, LEARNING_RATES),
            table_learning_rate=drawn(
                optimizer.table_learning_rate, default.optimizer.table_learning_rate, TABLE_LEARNING_RATES
            ),
            dropout=None if dropout is None else drawn(given.model.dropout, options.dropout, DROPOUTS),
        )
        if trial not in found and len(found) < config.trials:
            found.append(trial)
    return found


def _settings(best: TrainModelConfig) -> dict[str, Any]:
    """The table `train`: what differs from the defaults, the features, and what was varied."""
    found = _changes(best, TrainModelConfig(data="", out=""), without=_OF_A_RUN)
    varied = {"learning_rate": best.optimizer.learning_rate, "table_learning_rate": best.optimizer.table_learning_rate}
    found |= {"epochs": best.epochs, "optimizer": found.get("optimizer", {}) | varied}
    model = {} if ":" in best.factory else {"name": best.factory}
    found["model"] = model | _changes(best.model, type(best.model)())
    if hasattr(best.model, "dropout"):
        found["model"]["dropout"] = best.model.dropout
    if best.features:
        found["features"] = {name: _changes(one, type(one)()) for name, one in best.features.items()}
    return found


def _changes(made: Any, default: Any, without: tuple[str, ...] = ()) -> dict[str, Any]:
    """The options of a dataclass that differ from those of `default`."""
    found: dict[str, Any] = {}
    for part in fields(made):
        value, other = getattr(made, part.name), getattr(default, part.name, None)
        if part.name in without or value == other or value is None:
            continue
        if is_dataclass(value):
            plain = {f.name: getattr(value, f.name) for f in fields(value)}
            found[part.name] = (
                _changes(value, other)
                if is_dataclass(other)
                else {name: content for name, content in plain.items() if content is not None}
            )
        else:
            found[part.name] = list(cast(Any, value)) if isinstance(value, tuple) else value
    return found
