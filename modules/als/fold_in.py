"""Vectors of new users or items from their interactions, with the vectors of the other side fixed."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
import torch.distributed as dist

from recpress.modules.als.auto import item_weights
from recpress.modules.als.exchange import Exchange
from recpress.modules.als.factorization import check
from recpress.modules.als.half_sweep import FAR, HalfSweep, Limits, Scales, SideSums, Workers
from recpress.modules.als.interactions import CSR
from recpress.modules.als.solvers import solve_cholesky
from recpress.modules.config import ALSParameters


def fold_in(
    config: ALSParameters,
    others: torch.Tensor,
    indptr: np.ndarray,
    indices: np.ndarray,
    values: np.ndarray | None = None,
    *,
    gramian: torch.Tensor | None = None,
    num_others: int | None = None,
    process_group: dist.ProcessGroup | None = None,
    sharded: bool = False,
    limits: Limits = FAR,
    side: Literal["user", "item"] = "user",
    other_counts: np.ndarray | None = None,
) -> torch.Tensor:
    """Exact vectors (rows, dim) of new users over the items' vectors, or of new items over the users' vectors.

    Args:
        config: `ALS.parameters` of the fit.
        others: vectors (num_others, dim) of the other side, on the device to use. If `sharded`, this rank's block of
            `num_others` rows, as in `Factors`; then all ranks call this, each with its own new rows.
        indptr, indices, values: interactions of the new rows as CSR: (rows + 1,), (nnz,), and (nnz,) or None for ones.
            A negative index is an unknown id and is ignored. A row without known ids gets the zero vector.
        gramian: others' others (dim, dim), if known.
        side: whether the new rows are users or items.
        other_counts: interactions of each item in the fit (`Factors.item_counts`), (num_others,). New users need it if
            `config.item_exponent` is not 0.

    Raises:
        ValueError: an index or value is out of range; a row's equations cannot be solved.
    """
    check(config)
    exchange = Exchange(process_group, others.device)
    if not sharded:
        exchange.world, exchange.rank = 1, 0
    num_others = len(others) if num_others is None else num_others
    csr = known_interactions(np.asarray(indptr, np.int64), np.asarray(indices), values, num_others)
    scales = None
    if config.item_exponent and side == "item":
        scales = Scales(rows=item_weights(config, np.diff(csr.indptr)))
    elif config.item_exponent:
        if other_counts is None or len(other_counts) != num_others:
            raise ValueError(f"fold_in: other_counts: expected the counts of {num_others} items, for item_exponent")
        scales = Scales(others=item_weights(config, np.asarray(other_counts)))
    rows = torch.zeros(csr.num_rows, others.shape[1], device=others.device)
    workers = Workers(exchange.device)
    try:
        used = config.used_items if side == "user" else config.used_users
        solved = HalfSweep(
            "row", csr, max(csr.num_rows, 1), num_others, config, exchange, workers, limits, scales, used_others=used
        )
        others = others.to(torch.float32)
        if gramian is None:
            gramian = others.new_zeros((others.shape[1],) * 2, dtype=torch.float64)
            for part in others.split(4096):
                gramian += part.T @ part
            exchange.sum(gramian)
        solved.solve(rows, others, SideSums(gramian.double(), torch.zeros_like(gramian).double(), 0.0), solve_cholesky)
    finally:
        workers.close()
    return rows


def known_interactions(indptr: np.ndarray, indices: np.ndarray, values: np.ndarray | None, num_others: int) -> CSR:
    """The interactions with known ids. Raises ValueError if an index or value is out of range."""
    if indptr.ndim != 1 or not len(indptr) or indptr[0] != 0 or indptr[-1] != len(indices):
        raise ValueError(f"fold_in: indptr: expected 0 to {len(indices)}, the number of indices")
    if len(indices) and int(indices.max()) >= num_others:
        at = int(np.argmax(indices >= num_others))
        raise ValueError(f"fold_in: index {indices[at]} at {at}, expected less than {num_others}")
    if values is not None:
        values = np.asarray(values, np.float32)
        good = np.isfinite(values) & (values >= 0)
        if len(values) != len(indices) or not good.all():
            where = "their number differs" if len(values) != len(indices) else f"{values[~good][0]} found"
            raise ValueError(f"fold_in: values: expected {len(indices)} finite numbers >= 0, {where}")
    known = indices >= 0
    if not known.all():
        kept = np.concatenate(([0], np.cumsum(known)))
        indptr, indices = kept[indptr], indices[known]
        values = None if values is None else values[known]
    return CSR(0, indptr, indices.astype(np.int32), values)
