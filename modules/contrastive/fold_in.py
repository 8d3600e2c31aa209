"""Vectors of new users or items from their interactions, with the vectors of the other side fixed."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F

from recpress.modules.als.fold_in import known_interactions
from recpress.modules.config import ContrastiveConfig
from recpress.modules.contrastive.batches import BatchMaker, NegativeSampler
from recpress.modules.contrastive.factorization import (
    LAST_RATE,
    check,
    gradients,
    item_lengths,
    to_device,
    with_defaults,
)
from recpress.modules.contrastive.losses import make_loss
from recpress.modules.contrastive.row_adam import RowAdam

STEPS = 60
"""Steps of Adam from the mean of a row's interactions."""
NEGATIVES = 4096
"""More than in training: they are drawn once."""


def fold_in(
    config: ContrastiveConfig,
    others: torch.Tensor,
    indptr: np.ndarray,
    indices: np.ndarray,
    values: np.ndarray | None = None,
    *,
    other_counts: np.ndarray,
    side: Literal["user", "item"] = "user",
) -> torch.Tensor:
    """Vectors (rows, dim) of new users over the items' vectors, or of new items over the users' vectors.

    Minimizes the loss of the factorization over the new rows alone. A row depends on its own interactions and the seed
    only. As in a fit, users have length one and items have length count ** popularity_exponent.

    Args:
        config: settings of the fit.
        others: vectors (num_others, dim) of the other side, on the device to use. Only their directions count.
        indptr, indices, values: interactions of the new rows as CSR: (rows + 1,), (nnz,), and (nnz,) or None for ones.
            A negative index is an unknown id and is ignored. A row without known ids gets the zero vector.
        other_counts: interactions of each id of the other side in the fit (`Factors`), (num_others,).
        side: whether the new rows are users or items.

    Raises:
        ValueError: an index or value is out of range.
    """
    check(config)
    config = with_defaults(config)
    if len(other_counts) != len(others):
        raise ValueError(f"fold_in: other_counts: expected {len(others)} counts, got {len(other_counts)}")
    csr = known_interactions(np.asarray(indptr, np.int64), np.asarray(indices), values, len(others))
    counts = np.asarray(other_counts)
    rows = torch.zeros(csr.num_rows, others.shape[1], device=others.device)
    if not len(csr.indices):
        return rows
    # a user repels the items that the loss draws as its negatives, an item the users that draw it as one of theirs
    exponent = config.negative_exponent if side == "user" else 1 - config.user_exponent
    sampler = NegativeSampler(counts, exponent, unbiased=side == "user")
    weight = np.ones(csr.num_rows, np.float32)
    if side == "item":
        csr.values = np.ones(len(csr.indices), np.float32) if csr.values is None else csr.values
        csr.values = csr.values * np.maximum(counts[csr.indices], 1).astype(np.float32) ** -config.user_exponent
    maker = BatchMaker(
        csr, weight, sampler, negatives=NEGATIVES, most_users=config.batch_users, most_positives=len(csr.indices)
    )
    loss = make_loss(config)
    for parts in maker.in_order():
        batch = maker.make(parts, np.random.default_rng([config.seed % 2**32, 1]))
        on = to_device(batch, others.device)
        item = F.normalize(others.index_select(0, torch.from_numpy(batch.items).to(others.device)).float())
        mean = F.embedding_bag(on.positive, item, on.indptr, mode="mean", include_last_offset=True)
        adam = RowAdam(F.normalize(mean).mul_(0.1 * others.shape[1] ** 0.5))
        every = torch.arange(len(mean), device=others.device)
        for step in range(STEPS):
            user, inverse = adam.read(every)
            _, gradient, _ = gradients(loss, on, user, item, sampler.num_items)
            rate = config.learning_rate * (1 - (1 - LAST_RATE) * step / STEPS)
            adam.step(every, user, inverse, gradient, rate)
        rows.index_copy_(0, on.users, F.normalize(adam.rows))
    return rows.mul_(item_lengths(config, np.diff(csr.indptr), others.device)) if side == "item" else rows
