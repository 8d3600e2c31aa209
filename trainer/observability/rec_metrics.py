"""TorchRec's metrics of the rows that are trained on: NE, AUC, calibration over a window, and throughput."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torchrec.metrics.auc import AUCMetric
from torchrec.metrics.calibration import CalibrationMetric
from torchrec.metrics.metrics_config import DefaultTaskInfo
from torchrec.metrics.ne import NEMetric
from torchrec.metrics.rec_metric import RecMetricList
from torchrec.metrics.throughput import ThroughputMetric

from recpress.modules.two_tower.predictions import ObservedLoss, Predictions
from recpress.trainer.checkpoint.staged import State
from recpress.trainer.config import MetricsConfig, WindowConfig

WINDOW_SECONDS = 100
"""Window of the throughput."""
_WARMUP_STEPS = 10


class RecMetrics:
    """Keeps the last predictions in a window and computes the metrics at log intervals.

    Each rank holds its part of the window on the device of the loss, so a step costs one copy. At a log interval rank 0
    gathers the window and computes TorchRec's metrics. The window is part of checkpoints, so a resumed run reports the
    same values as an uninterrupted one.

    Args:
        loss: the loss of the model; it reports its predictions from here on.
        rows: rows per step of all ranks.
    """

    def __init__(self, config: WindowConfig, loss: ObservedLoss, *, rows: int, device: torch.device) -> None:
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self._pairs = -(-config.window // self.world)
        self._window = torch.zeros(3, self._pairs, device=device)  # probability, label, weight
        self._next, self._filled = 0, 0
        self._throughput = ThroughputMetric(
            batch_size=rows, world_size=1, window_seconds=WINDOW_SECONDS, warmup_steps=_WARMUP_STEPS
        )
        self._metrics: RecMetricList | None = None
        if self.rank == 0:
            whole = self._pairs * self.world
            given: dict[str, Any] = {"world_size": 1, "my_rank": 0, "batch_size": 1, "tasks": [DefaultTaskInfo]}
            kinds = [NEMetric, AUCMetric]
            if loss.calibrated:
                kinds.append(CalibrationMetric)
            self._metrics = RecMetricList([kind(**given, window_size=whole) for kind in kinds])
        loss.observer = self.add
        loss.observed = config.negatives if isinstance(config, MetricsConfig) else 0

    def add(self, found: Predictions) -> None:
        """Replace the oldest pairs by those of a step. A pair with a non-finite value gets weight 0."""
        new = torch.stack([found.probability, found.label, found.weight]).detach()[:, -self._pairs :]
        new = torch.where(torch.isfinite(new).all(0), new, torch.zeros_like(new))
        count = new.shape[1]
        first = min(count, self._pairs - self._next)
        self._window[:, self._next : self._next + first] = new[:, :first]
        self._window[:, : count - first] = new[:, first:]
        self._next = (self._next + count) % self._pairs
        self._filled = min(self._filled + count, self._pairs)

    def step(self) -> None:
        """Call it after each step, for the throughput."""
        self._throughput.update()

    def compute(self) -> dict[str, float]:
        """The metrics of the window, on rank 0; {} on other ranks. Collective."""
        window = self._gather()
        if self._metrics is None:
            return {}
        probability, label, weight = window.double()
        task = DefaultTaskInfo.name
        self._metrics.reset()
        self._metrics.update(predictions={task: probability}, labels={task: label}, weights={task: weight})
        found = self._metrics.local_compute() | self._throughput.compute()
        names = {
            f"ne-{task}|local_window_ne": "ne",
            f"auc-{task}|local_window_auc": "auc",
            f"calibration-{task}|local_window_calibration": "calibration",
            "throughput-throughput|window_throughput": "throughput",
            "throughput-throughput|lifetime_throughput": "throughput_lifetime",
        }
        return {short: float(found[name]) for name, short in names.items() if name in found}

    def _gather(self) -> torch.Tensor:
        """(3, pairs): the filled part of the window of all ranks, on the host of rank 0."""
        own = self._window[:, : self._filled].cpu()
        if self.world == 1:
            return own
        filled = torch.zeros(self.world, dtype=torch.int64)
        filled[self.rank] = self._filled
        dist.all_reduce(filled)
        own = torch.nn.functional.pad(own, (0, int(filled.max()) - self._filled))
        parts = [torch.empty_like(own) for _ in range(self.world)] if self.rank == 0 else None
        dist.gather(own, parts, dst=0)
        if parts is None:
            return own
        return torch.cat([part[:, :count] for part, count in zip(parts, filled.tolist(), strict=True)], 1)

    def state(self) -> State:
        """State of this rank for a checkpoint; `load` takes it, filled."""
        found = {
            "window": self._window,
            "place": torch.tensor([self._next, self._filled]),
            **self._throughput.state_dict(),
        }
        return {f"metrics/{name}/{self.rank}": value for name, value in found.items()}

    def load(self, state: State) -> None:
        """Restore the `state` of a checkpoint with the same world size."""
        given = {name.split("/")[1]: value for name, value in state.items()}
        self._window.copy_(given.pop("window"))
        self._next, self._filled = given.pop("place").tolist()
        self._throughput.load_state_dict(given)
