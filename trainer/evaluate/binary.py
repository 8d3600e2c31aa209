"""Metrics of predicted probabilities on held-out rows of all ranks, by TorchRec's RecMetrics."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.distributed as dist
from torchrec.metrics.auc import AUCMetric
from torchrec.metrics.calibration import CalibrationMetric
from torchrec.metrics.metrics_config import DefaultTaskInfo
from torchrec.metrics.ne import NEMetric
from torchrec.metrics.rec_metric import RecMetricList

from recpress.data.errors import InputError
from recpress.trainer.distributed.collectives import all_reduce, gather_arrays
from recpress.trainer.distributed.rank_errors import raise_on_all_ranks
from recpress.trainer.model.trained import TOLERANCE

AUC_ROWS = 1 << 23
"""AUC needs all predictions on one rank: of more rows than this, an even share per rank. The others are sums."""
_TASK = DefaultTaskInfo.name


class BinaryMetrics:
    """Collects predictions of this rank; `compute` gives AUC, NE, LogLoss (in nats) and Calibration of all ranks.

    NE is the log loss over the entropy of the mean label; Calibration is the sum of predictions over that of labels.
    """

    def __init__(self) -> None:
        given = {"world_size": 1, "my_rank": 0, "batch_size": 1, "tasks": [DefaultTaskInfo], "window_size": 1 << 62}
        self._given = given
        self._sums = RecMetricList([NEMetric(**given, include_logloss=True), CalibrationMetric(**given)])
        self._rows: list[torch.Tensor] = []

    @torch.no_grad()
    def add(self, probability: torch.Tensor, label: torch.Tensor) -> None:
        """(n,) each, n > 0."""
        p, y = probability.detach().double().cpu(), label.double().cpu()
        self._rows.append(torch.stack([p.float(), y.float()]))
        self._update(self._sums, p, y)  # clamps p in place

    def compute(self) -> dict[str, float]:
        """The metrics and the number of rows, the same on every rank. Collective.

        Rows of one label have no AUC and no NE.

        Raises:
            ValueError: a prediction is not finite.
            InputError: a prediction is not in [0, 1]. Both on every rank.
        """
        rows = torch.cat(self._rows, 1) if self._rows else torch.zeros(2, 0)
        with raise_on_all_ranks():
            if not torch.isfinite(rows).all():
                raise ValueError("a prediction of a held-out row is not finite")
            low, high = (float(bound) for bound in rows[0].aminmax()) if rows.numel() else (0.0, 1.0)
            if low < -TOLERANCE or high > 1 + TOLERANCE:
                raise InputError(
                    f"predictions of held-out rows are in [{low:.4g}, {high:.4g}], expected probabilities in [0, 1]"
                )
        sums = all_reduce(torch.tensor([rows.shape[1], float(rows[1].double().sum())], dtype=torch.float64))
        total, positives = int(sums[0]), float(sums[1])
        for metric in self._sums.rec_metrics:
            for computation in metric._metrics_computations:
                for name in computation._defaults:
                    state = getattr(computation, name)
                    if isinstance(state, torch.Tensor) and "window" not in name:
                        state.copy_(all_reduce(state))
        step = -(-total // AUC_ROWS) if total else 1
        found = [self._sums_computed() | {"AUC": self._auc(rows[:, ::step])}]
        dist.broadcast_object_list(found)
        names = ("AUC", "NE", "LogLoss", "Calibration") if 0 < positives < total else ("LogLoss", "Calibration")
        return {name: found[0][name] for name in names} | {"rows": float(total)}

    def _sums_computed(self) -> dict[str, float]:
        found = self._sums.local_compute()
        prefix = f"ne-{_TASK}|local_lifetime_"
        return {
            "NE": float(found[f"{prefix}ne"]),
            "LogLoss": float(found[f"{prefix}logloss"]) * math.log(2),  # TorchRec's is in bits
            "Calibration": float(found[f"calibration-{_TASK}|local_lifetime_calibration"]),
        }

    def _auc(self, rows: torch.Tensor) -> float:
        """On rank 0; NaN on other ranks. Collective."""
        parts = gather_arrays([rows[0].numpy(), rows[1].numpy()])
        if parts is None:
            return math.nan
        p, y = (torch.from_numpy(np.concatenate([part[j] for part in parts])).double() for j in (0, 1))
        metric = RecMetricList([AUCMetric(**self._given)])
        self._update(metric, p, y)
        return float(metric.local_compute()[f"auc-{_TASK}|local_window_auc"])

    def _update(self, metrics: RecMetricList, p: torch.Tensor, y: torch.Tensor) -> None:
        metrics.update(predictions={_TASK: p}, labels={_TASK: y}, weights={_TASK: torch.ones_like(p)})
