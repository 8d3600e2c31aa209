"""LightGCN on the rows of a map (He et al. 2020): the backbone of GraphHash and BACO.

The vector of an id is the mean over 0 to `layers` steps of propagation of the vectors that the maps read: with the
normalized adjacency A = D^-1/2 B D^-1/2 of the bipartite graph of train examples, (X + A X + A A X) / 3. So ids that
share a row have different vectors, because their neighbors differ. Only the rows are trained, by BPR.
"""

from __future__ import annotations

import math
import os
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from recpress.data.errors import InputError
from recpress.data.seeds import key
from recpress.modules.hashing.id_map import IdMap
from recpress.modules.hashing.map_matrix import MapMatrix
from recpress.trainer.compare.config import LightGCNConfig

Pairs = tuple[np.ndarray, np.ndarray]
"""Users and items of the train examples, (E,) each."""

STATE = ("step", "exp_avg", "exp_avg_sq")
"""State of Adam for one table."""


class Propagation:
    """Mean of 0 to `layers` steps over the normalized bipartite graph; a symmetric linear map of (ids, d).

    Ids are the users and then the items. An id without examples is not propagated: its mean has only its own vector.

    Args:
        pairs: train examples; a repeated pair is one edge.
    """

    def __init__(self, pairs: Pairs, num_users: int, num_items: int, layers: int) -> None:
        edges = np.unique(np.asarray(pairs[0], np.int64) * num_items + pairs[1])
        users, items = edges // num_items, edges % num_items + num_users
        rows, columns = np.concatenate([users, items]), np.concatenate([items, users])
        order = np.argsort(rows, kind="stable")
        degree = np.bincount(rows, minlength=num_users + num_items)
        scale = 1 / np.sqrt(np.maximum(degree, 1))
        self.layers, self.num_users = layers, num_users
        self._columns = torch.from_numpy(columns[order].astype(np.int32))
        self._weights = torch.from_numpy((scale[rows] * scale[columns])[order].astype(np.float32))
        self._offsets = torch.from_numpy(np.concatenate([[0], np.cumsum(degree)[:-1]]).astype(np.int32))

    def __call__(self, vectors: Tensor) -> Tensor:
        total = vectors
        for _ in range(self.layers):  # Horner: x + A (x + A x)
            step = F.embedding_bag(self._columns, total, self._offsets, mode="sum", per_sample_weights=self._weights)
            total = step.add_(vectors)
        return total / (self.layers + 1)


class LightGCN:
    """Trainable rows of users and items, and the vectors that propagation makes of them.

    Args:
        maps: of users and items; None: one row per id. An id with two rows of a `co-cluster` map has their mean, as in
            BACO; otherwise the sum, weighted if the map has weights.
    """

    def __init__(
        self,
        pairs: Pairs,
        num_users: int,
        num_items: int,
        maps: tuple[IdMap, IdMap] | None,
        config: LightGCNConfig,
        seed: int,
    ) -> None:
        self.config, self.seed = config, seed
        self.pairs = tuple(torch.from_numpy(np.asarray(ids, np.int64)) for ids in pairs)
        self.num_users, self.num_items = num_users, num_items
        self.maps = [MapMatrix(_as_mean(id_map)) for id_map in maps or ()]
        self.propagate = Propagation(pairs, num_users, num_items, config.layers)
        generator = torch.Generator().manual_seed(key("light-gcn", seed) % 2**63)
        self.rows = [
            (config.init_std * torch.randn(size, config.dim, generator=generator)).requires_grad_()
            for size in ([id_map.num_rows for id_map in maps] if maps else [num_users, num_items])
        ]

    def vectors(self, rows: list[Tensor] | None = None) -> Tensor:
        """(users + items, dim), differentiable in the rows."""
        found: Tensor = _Vectors.apply(self, *(self.rows if rows is None else rows))
        return found


def _as_mean(id_map: IdMap) -> IdMap:
    """The map with weights that make the mean of the two rows of a co-cluster map."""
    if id_map.method != "co-cluster" or id_map.rows_per_id == 1:
        return id_map
    return replace(id_map, weights=torch.full(id_map.rows.shape, 1 / id_map.rows_per_id))


class _Vectors(torch.autograd.Function):
    """Rows of both tables -> propagated vectors. Both parts are linear and the propagation is symmetric, so the
    gradient needs no saved activations."""

    @staticmethod
    def forward(ctx: Any, model: LightGCN, *rows: Tensor) -> Tensor:
        ctx.model = model
        return model.propagate(
            torch.cat([part.expand(of) for part, of in zip(model.maps, rows, strict=True)] if model.maps else rows)
        )

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        model = ctx.model
        parts = model.propagate(gradient).split([model.num_users, model.num_items])
        if model.maps:
            parts = tuple(part.collapse(of) for part, of in zip(model.maps, parts, strict=True))
        return None, *parts


def bpr_loss(vectors: Tensor, users: Tensor, positives: Tensor, negatives: Tensor) -> Tensor:
    """Mean of -log sigmoid(x_u . y_i - x_u . y_j) (Rendle et al. 2009).

    Args:
        vectors: (ids, d); the ids of items follow those of users.
        users, positives, negatives: (B,) ids.
    """
    u, i, j = vectors.index_select(0, torch.cat([users, positives, negatives])).chunk(3)
    return F.softplus((u * (j - i)).sum(1)).mean()


@dataclass(frozen=True)
class Evaluation:
    """What is reported after an evaluation."""

    epoch: int
    loss: float
    """Mean over the epoch."""
    value: float
    """Of the validation examples."""
    best: float
    """The largest value so far."""
    seconds: float
    """Of one epoch, the mean of this process."""
    least_epochs: int
    """Until the end if no evaluation is better."""


@dataclass(frozen=True)
class Fitted:
    """The rows with the best validation value."""

    vectors: Tensor
    """Propagated, (users + items, dim)."""
    value: float
    epoch: int
    """After which the value was the best."""
    seconds: float
    """Training, all processes that worked on it, without evaluations."""


class LightGCNTraining:
    """Train a model until `patience` evaluations bring no improvement.

    An epoch is a pure function of the seed, its number and the state before it. After each evaluation the state is
    written to `path`, atomically; a later training with this path continues there and ends with the same rows.

    Args:
        validate: the value of the vectors (users + items, dim); the larger the better.
        path: file of the checkpoint, for this model, data and configuration alone; None: no checkpoints.
        on_evaluation: called after each one.

    Raises:
        InputError: the loss is not finite; the checkpoint is corrupt or does not fit.
    """

    def __init__(
        self,
        model: LightGCN,
        validate: Callable[[Tensor], float],
        path: Path | None = None,
        on_evaluation: Callable[[Evaluation], None] = lambda _: None,
    ) -> None:
        self.model, self._validate, self._path, self._report = model, validate, path, on_evaluation
        config = model.config
        self._optimizer = torch.optim.Adam(
            model.rows, lr=config.learning_rate, weight_decay=config.weight_decay, fused=True
        )
        self._epoch, self._seconds = 0, 0.0
        self._best = [rows.detach().clone() for rows in model.rows]
        self._best_value, self._best_epoch = -math.inf, 0

    def run(self) -> Fitted:
        config = self.model.config
        if self._path is not None and self._path.exists():
            self._load(self._path)
        first, before = self._epoch, self._seconds
        while self._epoch < config.epochs and not self._stale():
            start = time.monotonic()
            loss = self._run_epoch()
            self._seconds += time.monotonic() - start
            if self._epoch % config.evaluate_every and self._epoch < config.epochs:
                continue
            self._evaluate(loss, (self._seconds - before) / (self._epoch - first))
            if self._path is not None:
                self._save(self._path)
        with torch.no_grad():
            vectors = self.model.vectors(self._best)
        return Fitted(vectors, self._best_value, self._best_epoch, self._seconds)

    def _stale(self) -> bool:
        config = self.model.config
        return self._epoch - self._best_epoch >= config.patience * config.evaluate_every

    def _run_epoch(self) -> float:
        """One pass over the train examples; returns the mean loss."""
        model, config = self.model, self.model.config
        generator = torch.Generator().manual_seed(key("light-gcn", model.seed, self._epoch) % 2**63)
        users, items = model.pairs
        order = torch.randperm(len(users), generator=generator)
        negatives = torch.randint(model.num_items, (len(users),), generator=generator)
        total = 0.0
        for chosen in order.split(config.batch_size):
            self._optimizer.zero_grad()
            first_item = model.num_users
            loss = bpr_loss(model.vectors(), users[chosen], first_item + items[chosen], first_item + negatives[chosen])
            loss.backward()
            self._optimizer.step()
            total += float(loss.detach()) * len(chosen)
        self._epoch += 1
        mean = total / len(users)
        if not math.isfinite(mean):
            raise InputError(
                f"LightGCN: the loss of epoch {self._epoch} is {mean}; lower lightgcn.learning_rate or init_std"
            )
        return mean

    def _evaluate(self, loss: float, seconds: float) -> None:
        with torch.no_grad():
            value = self._validate(self.model.vectors())
        if value > self._best_value:
            self._best_value, self._best_epoch = value, self._epoch
            self._best = [rows.detach().clone() for rows in self.model.rows]
        config = self.model.config
        last = min(config.epochs, self._best_epoch + config.patience * config.evaluate_every)
        self._report(Evaluation(self._epoch, loss, value, self._best_value, seconds, max(0, last - self._epoch)))

    def _save(self, path: Path) -> None:
        arrays = {"progress": np.array([self._epoch, self._best_epoch, self._best_value, self._seconds])}
        for side, (rows, best) in enumerate(zip(self.model.rows, self._best, strict=True)):
            state = self._optimizer.state[rows]
            named = {"rows": rows.detach(), "best": best} | {name: state[name] for name in STATE}
            arrays |= {f"{name}-{side}": value.numpy() for name, value in named.items()}
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        with open(partial, "wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]
        os.replace(partial, path)

    def _load(self, path: Path) -> None:
        try:
            with np.load(path, allow_pickle=False) as saved:
                progress = saved["progress"].tolist()
                for side, rows in enumerate(self.model.rows):
                    found = {name: torch.from_numpy(saved[f"{name}-{side}"]) for name in ("rows", "best", *STATE)}
                    if found["rows"].shape != rows.shape or found["best"].shape != rows.shape:
                        raise ValueError(f"rows {tuple(found['rows'].shape)}, expected {tuple(rows.shape)}")
                    rows.data.copy_(found["rows"])
                    self._best[side] = found["best"]
                    self._optimizer.state[rows] = {name: found[name] for name in STATE}
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise InputError(f"{path}: incomplete or corrupt checkpoint ({error}); remove it to start over") from error
        self._epoch, self._best_epoch = int(progress[0]), int(progress[1])
        self._best_value, self._seconds = progress[2], progress[3]
