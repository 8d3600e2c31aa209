"""`recpress tune`: settings of the factorization and the network, chosen on validation rows within a budget of time."""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch.distributed as dist

from recpress.data.config import SampleConfig
from recpress.data.errors import InputError
from recpress.trainer.distributed.process_group import process_group
from recpress.trainer.distributed.rank_errors import raise_on_all_ranks
from recpress.trainer.factorize.config import FactorizeConfig
from recpress.trainer.factorize.stage import factorize
from recpress.trainer.train.stage import TrainResult, train
from recpress.trainer.tune.config import TuneConfig, TuneModelConfig
from recpress.trainer.tune.search import open_folder, say, search, write


@dataclass(frozen=True)
class Network:
    """The settings of a network that are varied."""

    epochs: int
    learning_rate: float
    dropout: float

    def __str__(self) -> str:
        return f"{self.epochs} epochs, learning rate {self.learning_rate:g}, dropout {self.dropout:g}"


@dataclass
class TuneResult:
    """The content of the TOML file, and the networks that were tried, best first."""

    settings: dict[str, Any]
    trials: list[tuple[Network, float]]


def tune_any(config: TuneConfig | TuneModelConfig) -> None:
    """`recpress tune`: of the two-tower network (`tune`), or of a model of labels (`labelled.tune_model`)."""
    if isinstance(config, TuneConfig):
        tune(config)
        return
    from recpress.trainer.tune.labelled import tune_model

    tune_model(config)


def tune(config: TuneConfig) -> TuneResult:
    """Factorize with settings chosen from many candidates, then train networks that differ in epochs, learning rate and
    dropout on one sample, and write the best settings to `config.out`. Collective.

    Every choice is made on validation rows: of the factorization on items held out of train, of the network on the
    validation rows that `train` holds out of its sample. The test part is not used.

    Raises:
        InputError: the log or the settings cannot be used; `out` exists. On every rank; nothing is written.
    """
    began = time.monotonic()
    with process_group(config.device) as ranks, ExitStack() as stack:
        folder = open_folder(config, ranks, stack)
        factors, metric = f"{folder}/factors", config.evaluation.metric
        say("factorizing")
        made = factorize(
            FactorizeConfig(
                data=config.data, out=factors, schema=config.schema, als=config.als, crossfit_rate=config.rate,
                crossfit_seed=config.seed, device=config.device,
            )
        )  # fmt: skip
        assert made.auto is not None
        found = search(
            config,
            _candidates(config),
            lambda number, network: _score(_train(config, network, factors, f"{folder}/model-{number}")),
            began=began,
            metric=metric,
        )
        settings = _settings(config, made.auto["settings"], found[0][0])
        with raise_on_all_ranks():
            if ranks.rank == 0:
                write(config.out, settings, found)
        dist.barrier()
        best, score = found[0]
        if dist.get_rank() == 0:
            print(f"{config.out}: {best}: {metric} {score:.4f}, best of {len(found)} networks", flush=True)
    return TuneResult(settings, found)


def _candidates(config: TuneConfig) -> list[Network]:
    """The defaults of frozen tables, then draws around them; a setting that was given stays."""
    defaults = replace(config.train, factors="factors").resolved()
    first = Network(defaults.epochs, defaults.optimizer.learning_rate, defaults.model.towers.dropout)
    given = config.train
    rng = np.random.default_rng(config.seed)
    found = [first]
    for _ in range(20 * config.trials):
        drawn = Network(
            epochs=given.epochs or int(rng.choice([2, 3, 5, 8, 12])),
            learning_rate=given.optimizer.learning_rate or float(rng.choice([5e-4, 1e-3, 2e-3, 4e-3])),
            dropout=given.model.towers.dropout
            if given.model.towers.dropout is not None
            else float(rng.choice([0.3, 0.5, 0.6, 0.7, 0.8])),
        )
        if drawn not in found and len(found) < config.trials:
            found.append(drawn)
    return found


def _train(config: TuneConfig, network: Network, factors: str, out: str) -> TrainResult:
    given = config.train
    return train(
        replace(
            given,
            data=config.data,
            out=out,
            factors=factors,
            schema=config.schema,
            sample=SampleConfig(rate=config.rate, seed=config.seed),
            evaluation=config.evaluation,
            epochs=network.epochs,
            optimizer=replace(given.optimizer, learning_rate=network.learning_rate),
            model=replace(given.model, towers=replace(given.model.towers, dropout=network.dropout)),
            tensorboard=False,
            device=config.device,
        )
    )


def _score(trained: TrainResult) -> float:
    """What the published network has on the validation rows."""
    if not trained.validation:
        raise InputError("tune: the log has too few rows to hold validation rows out; the defaults are all there is")
    return float(trained.validation["published"])


def _settings(config: TuneConfig, als: dict[str, Any], network: Network) -> dict[str, Any]:
    """The file: a table for each command that the settings are for."""
    absolute = {"unobserved_ratio": config.als.unobserved_weight, "mean_penalty": config.als.regularization}
    chosen = {name: value for name, value in als.items() if absolute.get(name) is None}
    if config.als.sweeps is None:
        del chosen["sweeps"]  # a fit ends when its objective hardly falls
    given = {"unobserved_weight": config.als.unobserved_weight, "regularization": config.als.regularization}
    chosen |= {name: value for name, value in given.items() if value is not None}
    chosen["frequency_exponent"] = config.als.frequency_exponent
    return {
        "factorize": {"crossfit_rate": config.rate, "crossfit_seed": config.seed, "als": chosen},
        "train": {
            "epochs": network.epochs,
            "sample": {"rate": config.rate, "seed": config.seed},
            "optimizer": {"learning_rate": network.learning_rate},
            "model": {"towers": {"dropout": network.dropout}},
        },
    }
