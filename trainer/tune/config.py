"""Configuration of `recpress tune`. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from recpress.data.config import Schema
from recpress.data.errors import InputError
from recpress.modules.config import ALSConfig
from recpress.trainer.config import EvaluationConfig, TrainConfig, at_least


@dataclass(frozen=True, kw_only=True)
class TuneConfig:
    """Choose settings of the factorization and of the network on validation rows, and write them as TOML."""

    data: str
    """The log: a folder, file or glob. Its test part is not used."""
    out: str
    """TOML file to write; `--config` of every command takes it. Must not exist, except with --overwrite."""
    minutes: float = 10.0
    """Time limit. The defaults are always tried."""
    trials: int = 12
    """Maximum number of networks to try, with the defaults."""
    schema: Schema = field(default_factory=Schema)
    als: ALSConfig = field(default_factory=lambda: ALSConfig(auto_trials=32, auto_cost=4.0))
    """The factorization. Settings that are not given are chosen from more candidates than in `factorize`."""
    rate: float = 0.1
    """Share of the examples that the network is trained on."""
    train: TrainConfig = field(default_factory=lambda: TrainConfig(data="", out=""))
    """The network. Settings that differ from the defaults are fixed."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    """How validation rows are ranked."""
    seed: int = 0
    """Seed of the candidates."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where everything runs."""
    overwrite: bool = False
    """Replace an existing --out."""

    def __post_init__(self) -> None:
        at_least(0, minutes=self.minutes)
        at_least(1, trials=self.trials)
        if not 0 < self.rate < 1:
            raise InputError(f"rate is {self.rate}, expected a number in (0, 1)")
