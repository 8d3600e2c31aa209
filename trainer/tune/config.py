"""Configuration of `recpress tune`. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from recpress.data.config import Schema
from recpress.data.errors import InputError
from recpress.modules.config import ALSConfig
from recpress.trainer.config import EvaluationConfig, TrainConfig, at_least
from recpress.trainer.train.config import TrainModelConfig


@dataclass(frozen=True, kw_only=True)
class SearchConfig:
    """What tuning any model has."""

    data: str
    """The log: a folder, file or glob. Its test part is not used."""
    out: str
    """TOML file to write; `--config` of every command takes it. Must not exist, except with --overwrite."""
    minutes: float = 10.0
    """Time limit. The defaults are always tried."""
    trials: int = 12
    """Maximum number of networks to try, with the defaults."""
    schema: Schema = field(default_factory=Schema)
    seed: int = 0
    """Seed of the candidates."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where everything runs."""
    overwrite: bool = False
    """Replace an existing --out."""

    def __post_init__(self) -> None:
        at_least(0, minutes=self.minutes)
        at_least(1, trials=self.trials)


@dataclass(frozen=True, kw_only=True)
class TuneConfig(SearchConfig):
    """Choose settings of the factorization and of the network on validation rows, and write them as TOML."""

    als: ALSConfig = field(default_factory=lambda: ALSConfig(auto_trials=32, auto_cost=4.0))
    """The factorization. Settings that are not given are chosen from more candidates than in `factorize`."""
    rate: float = 0.1
    """Share of the examples that the network is trained on."""
    train: TrainConfig = field(default_factory=lambda: TrainConfig(data="", out=""))
    """The network. Settings that differ from the defaults are fixed."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    """How validation rows are ranked."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.rate < 1:
            raise InputError(f"rate is {self.rate}, expected a number in (0, 1)")


@dataclass(frozen=True, kw_only=True)
class TuneModelConfig(SearchConfig):
    """Choose settings of a model of labels on validation rows, and write them as TOML: epochs, both learning rates, and
    the dropout if the model has one."""

    train: TrainModelConfig = field(default_factory=lambda: TrainModelConfig(data="", out=""))
    """The model. Settings that differ from the defaults are fixed. `train.evaluation.metric` chooses."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.train.evaluation.while_training:
            raise InputError(
                "train.evaluation.every is 0: no validation rows, on which tune chooses; expected at least 1"
            )
        if self.train.stop_after:
            raise InputError("train.stop_after: expected 0; tune varies the number of epochs")
        if self.train.out:
            raise InputError("train.out: expected none; tune removes the models that it trains")
