"""What `recpress plan` predicts for a training run that ran out of memory."""

from __future__ import annotations

from dataclasses import fields

from recpress.data.errors import InputError
from recpress.trainer.config import TrainConfig
from recpress.trainer.plan.config import ClusterConfig, PlanConfig
from recpress.trainer.plan.job import job_of
from recpress.trainer.plan.memory import PHASES, gib, peaks
from recpress.trainer.plan.meta_model import MetaTowers, activation_bytes
from recpress.trainer.plan.sizing import assess

_SHOWN = 3


def predicted(config: TrainConfig, ranks: int, device: str) -> str:
    """One sentence: the peak of a rank during training and its largest parts. Empty if the run cannot be planned.

    Args:
        device: "cuda" or "cpu".
    """
    try:
        values = {field.name: getattr(config, field.name) for field in fields(TrainConfig)}
        cluster = ClusterConfig(ranks_per_node=ranks, device=device)  # type: ignore[arg-type]
        job = job_of(PlanConfig(**values, cluster=cluster))
        model = MetaTowers(job)
        need = assess(job, model, cluster, activation_bytes(job, model))
    except (InputError, ValueError):
        return ""
    phases, place = PHASES["train"], need.place
    lines = [line for line in need.lines if line.place == place and line.phase in phases]
    largest = sorted(lines, key=lambda line: line.bytes, reverse=True)[:_SHOWN]
    parts = ", ".join(f"{line.name} {gib(line.bytes)}" for line in largest)
    return f"`recpress plan` predicts {gib(peaks(need.lines, place)['train'])} GiB per rank: {parts}"
