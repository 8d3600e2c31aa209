"""Configuration of `recpress evaluate`. Free of torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from recpress.data.config import Schema
from recpress.trainer.config import EvaluationConfig

Part = Literal["test", "val"]
PARTS: tuple[Part, ...] = ("test", "val")


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Rank the held-out rows of a log; with a model of labels, measure its predictions of them."""

    data: str
    """The log, with held-out rows."""
    model: str
    """A checkpoint of `recpress train`, or factors of `recpress factorize`."""
    out: str | None = None
    """JSON file for the metrics, which are also printed."""
    parts: tuple[Part, ...] = ()
    """With a model of labels (`train --model dlrm`): held-out parts to measure; by default all that have labels."""
    factory: str = ""
    """Module to import for a model of your own, as --model of `recpress train` named it: pkg.module:make."""
    schema: Schema = field(default_factory=Schema)
    """Columns of the log; by default those that a model of labels was trained with."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device of the scores."""
