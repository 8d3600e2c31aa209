"""Trains a model on the rows of a log in memory, and measures it. One process."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import nn
from torchrec import EmbeddingBagCollection, KeyedTensor

from recpress.trainer.compare.click.data import ClickLog, Rows
from recpress.trainer.compare.click.tables import Tables
from recpress.trainer.compare.config import ClickConfig
from recpress.trainer.compare.ties import auc_by_row
from recpress.trainer.evaluate.binary import BinaryMetrics
from recpress.trainer.evaluate.metrics import pointwise_auc
from recpress.trainer.model.factory import factory_of
from recpress.trainer.model.inputs import ModelInputs

Report = Callable[[str], None]
EVALUATION_ROWS = 1 << 14
"""Rows of a batch that is only measured."""
CURVATURE_ROWS = 1 << 16
"""Rows of train on which second derivatives are measured."""


@dataclass(frozen=True)
class _Inputs(ModelInputs):
    """The tables of a model are those given."""

    tables_module: Tables

    def embedding_bags(self, *features: str) -> EmbeddingBagCollection:
        return cast(EmbeddingBagCollection, self.tables_module)  # DLRM needs its configs and forward only


@dataclass(frozen=True)
class Trained:
    """A model with its best weights."""

    model: nn.Module
    tables: Tables
    value: float
    """The metric that chose them, on the validation rows; the larger the better."""
    epoch: int
    """That they are of; 0: they are those that it started from."""
    seconds: float


class Trainer:
    """Trains `name`, a model of `recpress train --model`, on the tables given.

    Args:
        name: `dlrm` or `dcn-v2`.
        metric: of the validation rows, which chooses the epoch: AUC, LogLoss or NE.
    """

    def __init__(self, name: str, log: ClickLog, config: ClickConfig, metric: str) -> None:
        self.name, self.log, self.config, self.metric = name, log, config, metric
        self.inputs = ModelInputs.of(log.features)

    def fit(
        self, tables: Tables, seed: int, report: Report, start: Trained | None = None, rate: float = 1.0
    ) -> Trained:
        """The model with the weights of the best epoch.

        Args:
            start: a trained model whose network is where this one starts; then epoch 0 may be the best.
            rate: factor of the learning rates. Adagrad's first step has the length of the learning rate, which is far
                too large for rows that are trained already.
        """
        began, config, log = time.perf_counter(), self.config, self.log
        torch.manual_seed(seed)
        inputs = self.inputs
        made = _Inputs(inputs.tables, inputs.keys, inputs.floats, inputs.dim, tables)
        model: nn.Module = factory_of(self.name)(config.network_of(self.name), made)
        own = {id(parameter) for parameter in tables.parameters()}
        names = [name for name, parameter in model.named_parameters() if id(parameter) not in own]
        best, epoch, value = _copy(model), 0, -math.inf
        if start is not None:
            weights = start.model.state_dict()
            model.load_state_dict({name: weights[name] for name in names}, strict=False)
            best, value = _copy(model), self.value(model, log.val)
        network = [parameter for parameter in model.parameters() if id(parameter) not in own]
        optimizers = [
            torch.optim.Adagrad(tables.parameters(), lr=rate * config.table_learning_rate, eps=1e-8),
            torch.optim.Adam(network, lr=rate * config.learning_rate),
        ]
        order = np.random.default_rng(seed)
        for turn in range(1, config.epochs + 1):
            if turn > 1:
                tables.after_epoch()
            loss = self._epoch(model, tables, optimizers, order)
            found = self.value(model, log.val)
            report(f"epoch {turn}: loss {loss:.4f}, {self.metric} of val {abs(found):.4f}")
            if found > value:
                best, epoch, value = _copy(model), turn, found
            elif turn - epoch >= config.patience:
                break
        model.load_state_dict(best)
        return Trained(model.eval(), tables, value, epoch, time.perf_counter() - began)

    def _epoch(
        self, model: nn.Module, tables: Tables, optimizers: list[torch.optim.Optimizer], order: np.random.Generator
    ) -> float:
        """Mean loss of one pass over train."""
        total, size, train = 0.0, self.config.batch_size, self.log.train
        rows = order.permutation(len(train))
        model.train()
        for first in range(0, len(rows), size):
            loss, _ = model(self.log.batch(train, rows[first : first + size]))
            for optimizer in optimizers:
                optimizer.zero_grad()
            loss.backward()
            tables.after_backward()
            for optimizer in optimizers:
                optimizer.step()
            total += float(loss.detach()) * min(size, len(rows) - first)
        return total / len(rows)

    @torch.no_grad()
    def predictions(self, model: nn.Module, rows: Rows) -> torch.Tensor:
        """Probabilities (n,) float32."""
        model.eval()
        return torch.cat([model(batch)[1] for batch in self.log.in_order(rows, EVALUATION_ROWS)])

    def value(self, model: nn.Module, rows: Rows) -> float:
        """The metric, the larger the better: LogLoss and NE are negative."""
        predicted = self.predictions(model, rows)
        if self.metric == "AUC":
            return pointwise_auc(predicted, rows.labels)
        return -_metrics(predicted, rows.labels)[self.metric]

    def test(self, model: nn.Module) -> tuple[dict[str, float], np.ndarray]:
        """(AUC, LogLoss, NE and Calibration of the test rows; a float32 for each row, whose mean is the AUC)."""
        predicted, labels = self.predictions(model, self.log.test), self.log.test.labels
        return _metrics(predicted, labels), auc_by_row(predicted.numpy(), labels.numpy()).astype(np.float32)

    def curvature(self, trained: Trained) -> dict[str, torch.Tensor]:
        """Table -> Gauss-Newton matrix of the loss by the vector of an access, (dim, dim) float64.

        With z the logit of a row, p its probability and J = dz/dv of the vector v of a feature: E[p (1 - p) J J'], the
        mean over the features of the table and rows of train.
        """
        dim, features = self.inputs.dim, [name for table in self.inputs.tables for name in table.feature_names]
        seen: list[KeyedTensor] = []
        hook = trained.tables.register_forward_hook(lambda module, args, output: seen.append(output))
        sums = torch.zeros(len(features), dim, dim, dtype=torch.float64)
        train = self.log.train
        rows = np.random.default_rng(0).permutation(len(train))[:CURVATURE_ROWS]
        for first in range(0, len(rows), EVALUATION_ROWS):
            seen.clear()
            _, predicted = trained.model(self.log.batch(train, rows[first : first + EVALUATION_ROWS]))
            # dz/dv: the derivative of the probability is p (1 - p) dz/dv
            slope = (predicted * (1 - predicted)).detach()
            (by_vector,) = torch.autograd.grad(predicted.sum(), seen[0].values())
            by_vector = by_vector.view(len(predicted), len(features), dim)
            sums += torch.einsum("bfi,bfj->fij", by_vector / slope.clamp_min(1e-9)[:, None, None], by_vector).double()
        hook.remove()
        by_feature = dict(zip(features, sums / len(rows), strict=True))
        return {
            table.name: torch.stack([by_feature[name] for name in table.feature_names]).mean(0)
            for table in self.inputs.tables
        }


def _metrics(predicted: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    metrics = BinaryMetrics()
    metrics.add(predicted, labels)
    return metrics.compute()


def _copy(model: nn.Module) -> dict[str, Any]:
    return {name: value.clone() for name, value in model.state_dict().items()}
