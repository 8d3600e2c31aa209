"""What the train loop is asked for, and what it did."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class FitConfig:
    """How long to train and how often to look."""

    epochs: int = 1
    evaluate_every: int = 0
    """Epochs between evaluations; 0: none while training."""
    evaluate_steps: int = 0
    """Steps between evaluations, besides; 0: none."""
    evaluate_first: bool = False
    """Evaluate before the first step: residual towers start with the factorization's own ranking."""
    metric: str = "NDCG@10"
    """What is best, of the metrics that the evaluation returns; the larger the better."""
    patience: int = 0
    """Stop after so many evaluations without a better one; 0: never."""
    keep_best: bool = True
    """End with the weights of the best evaluation."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """A loss that is NaN or infinite ends the run, or its batch changes nothing and is counted."""
    log_every: int = 50
    """Steps between log lines; also between checks of the losses, each of which waits for the device."""


@dataclass
class FitResult:
    """What a run did."""

    steps: int = 0
    rows: int = 0
    """Positive rows that this rank trained on."""
    train_seconds: float = 0.0
    """Without evaluations."""
    evaluate_seconds: float = 0.0
    skipped: int = 0
    """Batches of all ranks whose loss was not finite."""
    losses: list[float] = field(default_factory=list)
    """Mean over the ranks, of every log interval."""
    evaluations: list[dict[str, float]] = field(default_factory=list)
    """Each with its step, epoch and train_seconds."""
    best: dict[str, float] | None = None

    @property
    def rows_per_second(self) -> float:
        """Of this rank, evaluations left out."""
        return self.rows / max(self.train_seconds, 1e-9)
