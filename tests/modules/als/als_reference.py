"""The factorization in dense float64 numpy, straight from the formulas."""

from __future__ import annotations

import numpy as np

from recpress.modules.config import ALSParameters


def dense(users, items, values, shape):
    """Summed values (users, items), and which pairs have an interaction."""
    matrix, seen = np.zeros(shape), np.zeros(shape, bool)
    np.add.at(matrix, (users, items), 1.0 if values is None else values)
    seen[users, items] = True
    return matrix, seen


def regularization(config: ALSParameters, seen):
    """reg of each row of `seen`."""
    return config.regularization * (seen.sum(1) + config.unobserved_weight * seen.shape[1]) ** config.frequency_exponent


def objective(config: ALSParameters, x, y, matrix, seen):
    """As in ALSParameters's docstring, over all pairs."""
    weight = config.unobserved_weight + config.confidence * matrix
    fit = (weight * (seen - x @ y.T) ** 2).sum()
    penalty = (regularization(config, seen)[:, None] * x**2).sum() + (
        regularization(config, seen.T)[:, None] * y**2
    ).sum()
    return fit + penalty


def half_sweep(config: ALSParameters, y, matrix, seen):
    """Exact rows, one at a time; ids without an interaction have no vector."""
    y = np.where(seen.any(0)[:, None], y, 0.0)
    weight = config.unobserved_weight + config.confidence * matrix
    reg = regularization(config, seen)
    rows = np.zeros((len(matrix), y.shape[1]))
    for u in range(len(matrix)):
        if seen[u].any():
            system = (y * weight[u, :, None]).T @ y + reg[u] * np.eye(y.shape[1])
            rows[u] = np.linalg.solve(system, y.T @ (weight[u] * seen[u]))
    return rows


def fit(config: ALSParameters, x, y, matrix, seen):
    """All sweeps from the initial vectors; vectors and the objective after each."""
    history = []
    for _ in range(config.sweeps):
        x = half_sweep(config, y, matrix, seen)
        y = half_sweep(config, x, matrix.T, seen.T)
        history.append(objective(config, x, y, matrix, seen))
    return x, y, history
