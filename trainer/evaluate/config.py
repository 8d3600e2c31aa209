"""Configuration of `recpress evaluate`. Free of torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from recpress.data.config import Schema
from recpress.trainer.config import EvaluationConfig


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Rank the held-out rows of a log."""

    data: str
    """The log, with held-out rows."""
    model: str
    """A checkpoint of `recpress train`, or factors of `recpress factorize`."""
    out: str | None = None
    """JSON file for the metrics, which are also printed."""
    schema: Schema = field(default_factory=Schema)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device of the scores."""
