"""Configuration of `recpress factorize`. Free of torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from recpress.data.config import Schema
from recpress.data.errors import InputError
from recpress.modules.config import ALSConfig, ContrastiveConfig, LogisticConfig
from recpress.trainer.config import CheckpointConfig, at_least


@dataclass(frozen=True, kw_only=True)
class FactorizeConfig:
    """Factorize the full interaction matrix of a log."""

    data: str
    """The log: a folder, file or glob."""
    out: str
    """Folder of the factors; must not exist unless --overwrite."""
    schema: Schema = field(default_factory=Schema)
    method: Literal["als", "softmax", "logistic", "auto"] = "als"
    """`als`: weighted least squares; `softmax`: a contrastive loss of cosines, often better if all items are ranked;
    `logistic`: cross-entropy with sampled negatives; `auto`: `softmax` if it ranks held-out examples clearly better
    than `als`, else `als`."""
    als: ALSConfig = field(default_factory=ALSConfig)
    softmax: ContrastiveConfig = field(default_factory=ContrastiveConfig)
    logistic: LogisticConfig = field(default_factory=LogisticConfig)
    crossfit_rate: float = 0.0
    """Above 0: also compute factors that have not seen this share of the rows, to train a network on it."""
    crossfit_seed: int = 0
    """Seed of that sample; equal to --sample.seed of the network."""
    crossfit_kind: Literal["rows", "block", "user"] = "rows"
    """Kind of that sample; equal to --sample.kind of the network."""
    crossfit_sweeps: int = 3
    """`als`: sweeps over the other rows, from the factors of all rows, that let the vectors forget the sample."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """`softmax`: when to save checkpoints; a step is an epoch."""

    use_label: bool = False
    """`als`: scale the confidence of a row by its label. `logistic`: train on the labels, numbers in [0, 1], in place
    of sampled negatives: factors of clicks. Otherwise every row is a positive."""
    on_bad_file: Literal["stop", "skip"] = "stop"
    """For a file or row group that cannot be read, after retries: `stop` ends the stage and names it; `skip` skips its
    rows, and names and counts it (docs/train/log.md)."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device of the sweeps."""
    overwrite: bool = False
    """Replace an existing --out."""

    def __post_init__(self) -> None:
        if not 0 <= self.crossfit_rate < 1:
            raise InputError(f"crossfit_rate is {self.crossfit_rate}, expected a number in [0, 1)")
        at_least(1, crossfit_sweeps=self.crossfit_sweeps)
        at_least(1, **{"als.sweeps": self.als.sweeps})
