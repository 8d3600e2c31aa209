"""Solvers of one chunk of rows' normal equations, in torch, on CPU and CUDA.

A row x with the other side's vectors y_j of its interactions j, weights w_j >= 0 added by them, and the weight w_0
of every pair, has the normal equations (Hu, Koren, Volinsky 2008, equation 4)

    (w_0 Y'Y + sum_j w_j y_j y_j' + reg I) x = sum_j (w_0 + w_j) y_j .
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
import torch.nn.functional as F

warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta state")


@dataclass
class Chunk:
    """Rows of a CSR whose indices are places in `table`.

    indptr: (B + 1,) int32, indices: (nnz,) int32, weights: (nnz,) float32 or a float where all are the same,
    table: (M, d), reg: (B,) float32, start: (B, d), the rows' previous vectors.
    """

    indptr: torch.Tensor
    indices: torch.Tensor
    weights: torch.Tensor | float
    table: torch.Tensor
    reg: torch.Tensor
    start: torch.Tensor

    def gather_sum(self, weights: torch.Tensor) -> torch.Tensor:
        """sum_j weights_j y_j of each row: (nnz,) -> (B, d). embedding_bag is torch's fastest SpMM on CPU."""
        return F.embedding_bag(
            self.indices,
            self.table,
            self.indptr,
            mode="sum",
            per_sample_weights=weights,
            include_last_offset=True,
        )

    def dots(self, rows: torch.Tensor) -> torch.Tensor:
        """rows_b . y_j for each interaction j of each row b: (B, d) -> (nnz,)."""
        pattern = torch.sparse_csr_tensor(
            self.indptr,
            self.indices,
            rows.new_zeros(len(self.indices)),
            (len(rows), len(self.table)),
            check_invariants=False,
        )
        torch.sparse.sampled_addmm(pattern, rows, self.table.t(), beta=0.0, out=pattern)
        return pattern.values()


@dataclass
class Shared:
    """What all rows of a half-sweep share.

    gramian: (d, d), w_0 Y'Y; unobserved_weight: w_0; basis (d, d) and scale (d,): with n_b the degree of row b,
    basis diag(1 / (1 + n_b scale)) basis' approximates the inverse of its matrix (see `preconditioner`).
    """

    gramian: torch.Tensor
    unobserved_weight: float
    basis: torch.Tensor
    scale: torch.Tensor


def preconditioner(
    gramian: torch.Tensor, popular: torch.Tensor, reg: tuple[float, float]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Basis and scale of an inverse that all rows share, each by its degree.

    A row of n interactions is expected to have the matrix P + n Q with P = w_0 Y'Y + reg[0] I and
    Q = popular + reg[1] I, where popular (d, d) is the mean of w y y' over all interactions of the log, and
    reg[0] + n reg[1] is its regularization. One generalized eigenproblem P, Q gives the inverses for all n.
    """
    eye = torch.eye(len(gramian), dtype=torch.float64)
    # float64 on the CPU: a few milliseconds, once a half-sweep
    p = gramian.to("cpu", torch.float64) + reg[0] * eye
    q = popular.to("cpu", torch.float64) + reg[1] * eye
    lower = torch.linalg.cholesky(p)
    half = torch.linalg.solve_triangular(lower, q, upper=False)
    scale, vectors = torch.linalg.eigh(torch.linalg.solve_triangular(lower, half.T, upper=False))
    basis = torch.linalg.solve_triangular(lower.T, vectors, upper=True)
    return basis.to(gramian), scale.clamp_(min=0).to(gramian)


def solve_cg(chunk: Chunk, shared: Shared, steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`steps` steps of preconditioned conjugate gradients from `chunk.start`.

    Returns the rows (B, d) and their predictions x_b . y_j (nnz,), which the objective needs.
    """
    x, w, w0 = chunk.start, chunk.weights, shared.unobserved_weight
    reg = chunk.reg[:, None]
    degree = (chunk.indptr[1:] - chunk.indptr[:-1]).to(x.dtype)
    shrink = 1 / (1 + degree[:, None] * shared.scale)  # (B, d)
    scores = chunk.dots(x)
    residual = chunk.gather_sum((1 - scores).mul_(w).add_(w0))
    residual.addmm_(x, shared.gramian, alpha=-1).addcmul_(reg, x, value=-1)
    x = x.clone()
    direction = torch.zeros_like(x)
    rho = None
    for step in range(steps):
        z = ((residual @ shared.basis) * shrink) @ shared.basis.T
        rho_old, rho = rho, (residual * z).sum(1, keepdim=True)
        direction = z if rho_old is None else z.addcmul_(direction, rho / rho_old.clamp_min(1e-30))
        along = chunk.dots(direction)
        image = chunk.gather_sum(along * w).addmm_(direction, shared.gramian).addcmul_(reg, direction)
        length = rho / (direction * image).sum(1, keepdim=True).clamp_min(1e-30)
        x.addcmul_(length, direction)
        counts = chunk.indptr[1:] - chunk.indptr[:-1]
        scores.addcmul_(along, torch.repeat_interleave(length[:, 0], counts, output_size=len(along)))
        if step + 1 < steps:
            residual.addcmul_(length, image, value=-1)
    return x, scores
