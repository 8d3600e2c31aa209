"""Configuration and result of the train loop."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from recpress.trainer.config import Precision


@dataclass(frozen=True, kw_only=True)
class FitConfig:
    """How long to train, and how often to evaluate."""

    epochs: int = 1
    accumulate: int = 1
    """Batches per step of the dense part."""
    precision: Precision = "fp32"
    """Of the forward and backward passes; evaluations are in fp32."""
    evaluate_every: int = 0
    """Epochs between evaluations; 0: none while training."""
    evaluate_steps: int = 0
    """Steps between evaluations, in addition; 0: none."""
    evaluate_first: bool = False
    """Evaluate before the first step, where residual towers have the factorization's own ranking."""
    metric: str = "NDCG@10"
    """The metric of the evaluation that chooses the best weights."""
    smaller_is_better: bool = False
    """Of `metric`."""
    patience: int = 0
    """Stop after this many evaluations in a row without a better one; 0: never."""
    keep_best: bool = True
    """End with the weights of the best evaluation."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """For a loss that is NaN or infinite: end the run, or skip and count its batch."""
    log_every: int = 50
    """Steps between log lines. Each also checks the losses, which waits for the device."""


@dataclass
class FitResult:
    """What a run did."""

    steps: int = 0
    batches: int = 0
    """Of each rank."""
    rows: int = 0
    """Positive rows that this rank trained on."""
    train_seconds: float = 0.0
    """Without evaluations."""
    evaluate_seconds: float = 0.0
    skipped: int = 0
    """Batches with a non-finite loss, on all ranks."""
    losses: list[float] = field(default_factory=list)
    """Mean over the ranks, per log interval."""
    evaluations: list[dict[str, float]] = field(default_factory=list)
    """The metrics of each evaluation, with its step, epoch and train_seconds."""
    best: dict[str, float] | None = None

    @property
    def rows_per_second(self) -> float:
        """Of this rank, without evaluations."""
        return self.rows / max(self.train_seconds, 1e-9)
