"""Configuration of `recpress tune`. Free of torch."""

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
    """The log: a folder, file or glob. Its test part chooses nothing."""
    out: str
    """TOML file to write; `--config` of every command takes it. Must not exist unless --overwrite."""
    minutes: float = 10.0
    """Time to spend. At least the defaults are tried, however long they take."""
    trials: int = 12
    """Networks to try at most, the defaults among them."""
    schema: Schema = field(default_factory=Schema)
    als: ALSConfig = field(default_factory=lambda: ALSConfig(auto_trials=32, auto_cost=4.0))
    """The factorization; what is not given is chosen, from more candidates than `factorize` compares."""
    rate: float = 0.1
    """Share of the rows that the network is trained on."""
    train: TrainConfig = field(default_factory=lambda: TrainConfig(data="", out=""))
    """The network; what differs from its defaults is not varied."""
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
