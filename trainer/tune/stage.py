"""`recpress tune`: settings of the factorization and the network, chosen on validation rows within a budget of time."""

from __future__ import annotations

import json
import logging
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist

from recpress.data.config import SampleConfig
from recpress.data.dataset import object_store
from recpress.data.dataset.atomic import replacing
from recpress.data.errors import InputError
from recpress.trainer.distributed.process_group import process_group
from recpress.trainer.distributed.rank_errors import raise_on_all_ranks
from recpress.trainer.factorize.config import FactorizeConfig
from recpress.trainer.factorize.stage import factorize
from recpress.trainer.train.stage import TrainResult, train
from recpress.trainer.tune.config import TuneConfig

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Network:
    """The settings of a network that are varied."""

    epochs: int
    learning_rate: float
    dropout: float


@dataclass
class TuneResult:
    """The content of the TOML file, and the networks that were tried, best first."""

    settings: dict[str, Any]
    trials: list[tuple[Network, float]]


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
        folders: list[str] = [""]
        with raise_on_all_ranks():
            if object_store.is_remote(config.out):
                raise InputError(f"{config.out}: expected a local file")
            if Path(config.out).exists() and not config.overwrite:
                raise InputError(f"{config.out}: exists; choose another --out, or --overwrite")
            if not Path(config.out).resolve().parent.is_dir():
                raise InputError(f"{config.out}: its folder does not exist; create it first")
            if ranks.rank == 0:  # next to `out`, on a disk that all ranks see
                parent = Path(config.out).resolve().parent
                folders = [stack.enter_context(tempfile.TemporaryDirectory(prefix=".tune-", dir=parent))]
        dist.broadcast_object_list(folders)
        folder = folders[0]
        factors = f"{folder}/factors"
        _say("factorizing")
        made = factorize(
            FactorizeConfig(
                data=config.data, out=factors, schema=config.schema, als=config.als, crossfit_rate=config.rate,
                crossfit_seed=config.seed, device=config.device,
            )
        )  # fmt: skip
        assert made.auto is not None
        found: list[tuple[Network, float]] = []
        for number, network in enumerate(_candidates(config)):
            spent = time.monotonic() - began
            left = [config.minutes * 60 - spent - spent / max(number, 1)]
            dist.broadcast_object_list(left)
            if number and left[0] < 0:
                break
            _say(f"network {number + 1} of {config.trials}: {_shown(network)}; {spent:.0f} s of "
                 f"{config.minutes * 60:.0f} s spent")  # fmt: skip
            found.append((network, _score(_train(config, network, factors, f"{folder}/model-{number}"))))
            _say(f"{config.evaluation.metric} {found[-1][1]:.4f} on validation rows")
        found.sort(key=lambda trial: -trial[1])  # stable: of equals the first, so that the defaults win a tie
        settings = _settings(config, made.auto["settings"], found[0][0])
        with raise_on_all_ranks():
            if ranks.rank == 0:
                _write(config.out, settings, found)
        dist.barrier()
        best, score = found[0]
        if dist.get_rank() == 0:
            shown = f"{config.evaluation.metric} {score:.4f}, best of {len(found)} networks"
            print(f"{config.out}: {_shown(best)}: {shown}", flush=True)
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


def _write(path: str, settings: dict[str, Any], found: list[tuple[Network, float]]) -> None:
    lines = ["# Written by `recpress tune`: --config of every command takes what concerns it."]
    lines += [f"# {score:.4f}  {_shown(network)}" for network, score in found]
    lines += _tables(settings, "")
    with replacing(path) as temporary:
        temporary.write_text("\n".join(lines) + "\n")


def _tables(settings: dict[str, Any], name: str) -> list[str]:
    values = {key: value for key, value in settings.items() if not isinstance(value, dict)}
    lines = [f"[{name}]"] if values and name else []
    lines += [f"{key} = {json.dumps(value)}" for key, value in values.items()]
    for key, value in settings.items():
        if isinstance(value, dict):
            lines += _tables(value, f"{name}.{key}" if name else key)
    return lines


def _shown(network: Network) -> str:
    return f"{network.epochs} epochs, learning rate {network.learning_rate:g}, dropout {network.dropout:g}"


def _say(text: str) -> None:
    if dist.get_rank() == 0:
        logger.info("%s", text)
