"""A quick low-dimensional embedding of the ids of many features, learned in one pass over a sample of a log.

It is for features that no factorization covers. Ghaemmaghami et al. (2022) learn a low-dimensional embedding first and
then cluster it together with access frequency. This one is a factorization machine (Rendle 2010). Its second
derivatives have a closed form, so its vectors can be scaled such that distances measure loss, alike for all features.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

ACCUMULATOR = 10.0
"""Initial value of Adagrad's sum of squared gradients, worth about 40 accesses. So an id with few accesses moves
little; with an initial value of 0 its first step would be as long as any."""
MEMORY = 0.98
"""Decay of the running sum of second derivatives per batch."""


@dataclass(frozen=True, eq=False, kw_only=True)
class WarmUp:
    """Result of `warm_up`."""

    embeddings: list[torch.Tensor]
    """One per feature, (num_ids, 1 + dim) float32. The squared distance of two ids is twice the increase in log loss,
    to second order, if an access of one gets the vector of the other. An id that was never accessed has the mean vector
    of all accesses."""
    counts: list[torch.Tensor]
    """One per feature: how often each id was accessed, (num_ids,) int64."""
    rows: int
    """Number of training examples."""
    loss: float
    """Mean log loss of the batches, each before it was trained on."""


class FactorizationMachine(nn.Module):
    """logit = MLP(dense) + sum_f w_f + sum_(f<g) <v_f, v_g>, with (w_f, v_f) the row of the id of feature f.

    Args:
        num_dense: D, dense features; may be 0.
        num_ids: number of ids of each of the F categorical features.
        dim: dimension of v.
    """

    starts: torch.Tensor  # (F,) first row of each feature

    def __init__(self, num_dense: int, num_ids: Sequence[int], dim: int) -> None:
        super().__init__()
        self.table = nn.Embedding(sum(num_ids), 1 + dim, sparse=True)
        nn.init.normal_(self.table.weight, std=0.05)
        nn.init.zeros_(self.table.weight[:, 0].detach())
        self.mlp = nn.Sequential(nn.Linear(num_dense, 16), nn.ReLU(), nn.Linear(16, 1))
        starts = torch.tensor([0, *num_ids[:-1]]).cumsum(0)
        self.register_buffer("starts", starts)

    def forward(self, dense: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, D) float32, (B, F) int64 -> logits (B,) and their derivatives by the rows of the ids (B, F, 1 + dim)."""
        rows = self.table(ids + self.starts)
        vectors = rows[:, :, 1:]
        total = vectors.sum(1, keepdim=True)
        pairs = (total.square().sum((1, 2)) - vectors.square().sum((1, 2))) / 2
        logits = self.mlp(dense).squeeze(1) + rows[:, :, 0].sum(1) + pairs
        with torch.no_grad():
            by_rows = torch.cat([torch.ones_like(rows[:, :, :1]), total - vectors], 2)
        return logits, by_rows


def warm_up(
    batches: Iterable[tuple[torch.Tensor, torch.Tensor, torch.Tensor]],
    num_ids: Sequence[int],
    *,
    dim: int = 8,
    learning_rate: float = 0.05,
    dense_learning_rate: float = 1e-3,
    seed: int = 0,
    names: Sequence[str] = (),
) -> WarmUp:
    """Train a factorization machine in one pass over `batches`; return its scaled vectors and the counts.

    Uses cross-entropy, Adagrad for the vectors and Adam for the MLP of the dense features. With z the logit of an
    example and p = sigmoid(z), the second derivative of the loss by z is p (1 - p). With J = dz/d(w_f, v_f), G_f =
    E[p (1 - p) J J'] over the later examples is the Gauss-Newton matrix of feature f. The vectors of f are multiplied
    by the Cholesky factor of G_f. So clustering them, weighted by counts, minimizes the loss due to shared rows, in
    units that are the same for all features.

    Memory: 8 (1 + dim) bytes per id, and one batch. The same seed and batches give the same vectors on one machine.

    Args:
        batches: (dense (B, D) float32, ids (B, F) integer, label (B,) float32 in [0, 1]), in random order. D may be 0.
            Scale large values, for example by a logarithm.
        num_ids: F sizes; the ids of feature f are 0 to num_ids[f] - 1.
        dim: dimension of the interacting vectors. The embedding has one more dimension, for the linear term.
        names: names of the features, for errors.

    Raises:
        ValueError: no examples; shapes do not fit; an id is outside its feature; a value is not finite; a label is
            outside [0, 1].
    """
    sizes = list(num_ids)
    names = list(names) or [str(feature) for feature in range(len(sizes))]
    if not sizes or min(sizes) < 1 or len(names) != len(sizes) or dim < 1:
        raise ValueError(f"warm-up: {len(sizes)} features of {sizes} ids, {len(names)} names, dimension {dim}")
    counts = torch.zeros(sum(sizes), dtype=torch.int64)
    model: FactorizationMachine | None = None
    curvature = torch.zeros(len(sizes), 1 + dim, 1 + dim)
    weight = loss_sum = 0.0
    rows = 0
    for number, (dense, ids, label) in enumerate(batches):
        _check(number, dense, ids, label, sizes, names)
        ids, label = ids.long(), label.float()
        if model is None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                model = FactorizationMachine(dense.shape[1], sizes, dim)
            of_rows = torch.optim.Adagrad(
                model.table.parameters(), lr=learning_rate, initial_accumulator_value=ACCUMULATOR
            )
            of_dense = torch.optim.Adam(model.mlp.parameters(), lr=dense_learning_rate)
        logits, by_rows = model(dense, ids)
        loss = nn.functional.binary_cross_entropy_with_logits(logits, label, reduction="sum")
        of_rows.zero_grad()
        of_dense.zero_grad()
        loss.backward()
        of_rows.step()
        of_dense.step()
        loss_sum += float(loss.detach())
        rows += len(label)
        counts += torch.bincount((ids + model.starts).flatten(), minlength=len(counts))
        probability = logits.detach().sigmoid()
        second = (probability * (1 - probability))[:, None, None]
        curvature = MEMORY * curvature + torch.einsum("bfi,bfj->fij", second * by_rows, by_rows)
        weight = MEMORY * weight + len(label)
    if model is None:
        raise ValueError("warm-up: no examples, expected at least one batch")
    embeddings = []
    parts = zip(
        model.table.weight.detach().split(sizes), (curvature / weight).double(), counts.split(sizes), strict=True
    )
    for part, matrix, count in parts:
        share = count.double() / count.sum()
        part[count == 0] = (share @ part.double()).float()
        embeddings.append(part @ factor(matrix))
    return WarmUp(
        embeddings=embeddings,
        counts=[part.clone() for part in counts.split(sizes)],
        rows=rows,
        loss=loss_sum / rows,
    )


def factor(matrix: torch.Tensor) -> torch.Tensor:
    """L with L L' = matrix, which is positive semidefinite: (d, d) float64 -> float32."""
    floor = max(1e-9 * float(matrix.diagonal().mean()), 1e-30)
    return torch.linalg.cholesky(matrix + floor * torch.eye(len(matrix), dtype=matrix.dtype)).float()


def _check(
    number: int, dense: torch.Tensor, ids: torch.Tensor, label: torch.Tensor, sizes: list[int], names: list[str]
) -> None:
    rows = len(label)
    if ids.shape != (rows, len(sizes)) or dense.ndim != 2 or len(dense) != rows or label.ndim != 1 or not rows:
        raise ValueError(
            f"warm-up, batch {number}: dense {tuple(dense.shape)}, ids {tuple(ids.shape)}, labels "
            f"{tuple(label.shape)}; expected (B, D), (B, {len(sizes)}), (B,) with B at least 1"
        )
    low, high = ids.amin(0).tolist(), ids.amax(0).tolist()
    for name, size, least, most in zip(names, sizes, low, high, strict=True):
        if least < 0 or most >= size:
            bad = least if least < 0 else most
            raise ValueError(f"warm-up, batch {number}: feature {name!r} has the id {bad}, expected 0 to {size - 1}")
    if not bool(torch.isfinite(dense).all()):
        row = int((~torch.isfinite(dense)).any(1).nonzero()[0])
        raise ValueError(f"warm-up, batch {number}: row {row} has a dense value that is NaN or infinite")
    if not bool(((label >= 0) & (label <= 1)).all()):
        bad_label = float(label[~((label >= 0) & (label <= 1))][0])
        raise ValueError(f"warm-up, batch {number}: a label is {bad_label}, expected a number in [0, 1]")
