"""Solvers of the normal equations of a chunk of rows, in torch, on CPU and CUDA.

A row x with the other side's vectors y_j of its interactions j, the weights w_j >= 0 that they add, and the
weight w_0 of every pair, has the normal equations (Hu, Koren, Volinsky 2008, equation 4)

    (w_0 Y'Y + sum_j w_j y_j y_j' + reg I) x = sum_j (w_0 + w_j) y_j .
"""

from __future__ import annotations

import threading
import warnings
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from recpress.modules.id_check import host_reads

with warnings.catch_warnings():  # torch warns once per process that CSR tensors are in beta
    warnings.simplefilter("ignore")
    torch.eye(1).to_sparse_csr()

_TINY = 1e-30
_LEAST = 1 << 15  # least floats of a scratch array; untouched pages use no memory
_PADDED = 1 << 14  # padded interactions per batch of explicit matrices: about 8 MB of rows at 128 factors


class Scratch(threading.local):
    """Named float32 arrays that a thread reuses for each chunk.

    New arrays for each chunk would fragment a thread's heap to several times their size.
    """

    def __init__(self) -> None:
        self._flat: dict[str, torch.Tensor] = {}

    def floats(self, name: str, like: torch.Tensor) -> torch.Tensor:
        """Uninitialized, with the shape and device of `like`. Valid until the thread's next call with this name."""
        size = like.numel()
        if name not in self._flat or len(self._flat[name]) < size:
            self._flat.pop(name, None)  # free it before allocating the larger one
            self._flat[name] = torch.empty(max(_LEAST, 1 << (size - 1).bit_length()), device=like.device)
        return self._flat[name][:size].view(like.shape)


@dataclass
class Chunk:
    """B rows of a CSR, with the vectors that they need."""

    indptr: torch.Tensor
    """(B + 1,) int32."""
    indices: torch.Tensor
    """(nnz,) int32 row numbers of `table`."""
    weights: torch.Tensor | float
    """(nnz,) float32, or a float if all are equal."""
    table: torch.Tensor
    """(M, d) vectors of the other side."""
    reg: torch.Tensor
    """(B,) float32 regularization."""
    start: torch.Tensor
    """(B, d) previous vectors of the rows."""

    @property
    def degree(self) -> torch.Tensor:
        """Interactions of each row, (B,)."""
        return self.indptr[1:] - self.indptr[:-1]

    def per_interaction(self, rows: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """rows (B, ...) repeated for each interaction of the row: (nnz, ...), in `out` if given."""
        row = torch.repeat_interleave(self.degree, output_size=len(self.indices))
        return torch.index_select(rows, 0, row, out=out)

    def row_sum(self, numbers: torch.Tensor) -> torch.Tensor:
        """Sum over each row's interactions: (nnz,) -> (B,)."""
        return torch.segment_reduce(numbers, "sum", offsets=self.indptr.long(), initial=0)

    def weighted_sum(self, weights: torch.Tensor) -> torch.Tensor:
        """sum_j weights_j y_j of each row: (nnz,) -> (B, d).

        embedding_bag is by far torch's fastest product of a sparse and a dense matrix on a CPU.
        """
        return F.embedding_bag(
            self.indices, self.table, self.indptr,
            mode="sum", per_sample_weights=weights, include_last_offset=True,
        )  # fmt: skip

    def dots(self, rows: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """rows_b . y_j for each interaction j of each row b: (B, d) -> (nnz,), in `out` if given."""
        if rows.is_cuda:
            return (self.per_interaction(rows) * self.table[self.indices.long()]).sum(1)
        zeros = rows.new_zeros(len(self.indices)) if out is None else out.zero_()
        pattern = torch.sparse_csr_tensor(
            self.indptr, self.indices, zeros, (len(rows), len(self.table)), check_invariants=False
        )
        torch.sparse.sampled_addmm(pattern, rows, self.table.t(), beta=0.0, out=pattern)
        return pattern.values()


@dataclass
class SharedTerms:
    """The terms of the normal equations that all rows of a half-sweep share."""

    gramian: torch.Tensor
    """w_0 Y'Y, (d, d)."""
    unobserved_weight: float
    """w_0."""
    basis: torch.Tensor
    """(d, d), from `preconditioner`."""
    scale: torch.Tensor
    """(d,), from `preconditioner`."""
    scratch: Scratch = field(default_factory=Scratch)
    """Working arrays of the threads."""


def preconditioner(
    gramian: torch.Tensor, popular: torch.Tensor, reg: tuple[float, float]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Basis (d, d) and scale (d,): basis diag(1 / (1 + n scale)) basis' approximately inverts the matrix of a row.

    The expected matrix of a row with n interactions is P + n Q with P = w_0 Y'Y + reg[0] I and Q = popular + reg[1] I.
    `gramian` is w_0 Y'Y, `popular` (d, d) the mean of w y y' over all interactions of the log, and reg[0] + n reg[1]
    approximates the row's regularization. One generalized eigenproblem of P and Q inverts it for every n.
    """
    # in float64 on the CPU: a few milliseconds per half-sweep
    p = gramian.to("cpu", torch.float64, copy=True)
    q = popular.to("cpu", torch.float64, copy=True)
    p.diagonal().add_(reg[0])
    q.diagonal().add_(reg[1])
    p.diagonal().add_(1e-7 * (p.trace() + q.trace()) / len(p) + _TINY)  # w_0 and the regularization may be zero
    lower = torch.linalg.cholesky(p)
    q = torch.linalg.solve_triangular(lower, q, upper=False)
    scale, vectors = torch.linalg.eigh(torch.linalg.solve_triangular(lower, q.T, upper=False))
    basis = torch.linalg.solve_triangular(lower.T, vectors, upper=True)
    return basis.to(gramian.device, torch.float32), scale.clamp_(min=0).to(gramian.device, torch.float32)


def solve_cg(
    chunk: Chunk, shared: SharedTerms, steps: int, relaxation: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """`steps` steps of preconditioned conjugate gradients from `chunk.start`.

    relaxation: length of a single step in units of the best length. Below 2 the objective still falls. Between 1 and 2
    the alternation of users and items converges faster (successive over-relaxation).

    Returns the rows (B, d), in the memory of `chunk.start`, and their predictions x_b . y_j (nnz,) for the objective,
    in the thread's scratch memory.
    """
    assert relaxation == 1 or steps == 1, "later steps build on the best length of the ones before"
    w, w0, reg, degree = chunk.weights, shared.unobserved_weight, chunk.reg[:, None], chunk.degree[:, None]
    x = chunk.start.mul_(degree > 0)  # an empty row is exactly zero
    floats = shared.scratch.floats
    left, right, direction = floats("left", x), floats("right", x), floats("direction", x)
    scores, along, terms = (floats(name, chunk.indices) for name in ("scores", "along", "terms"))
    scores = chunk.dots(x, scores)
    residual = chunk.weighted_sum(torch.neg(scores, out=terms).add_(1).mul_(w).add_(w0))
    residual.addmm_(x, shared.gramian, alpha=-1).addcmul_(reg, x, value=-1)
    rho = None
    for step in range(steps):
        torch.mm(residual, shared.basis, out=left)
        left.mul_(torch.mul(degree, shared.scale, out=right).add_(1).reciprocal_())
        z = torch.mm(left, shared.basis.T, out=right)
        rho_old, rho = rho, torch.mul(residual, z, out=left).sum(1, keepdim=True)
        if rho_old is not None:
            z.addcmul_(direction, rho / rho_old.clamp_min(_TINY))
        direction, right = z, direction
        along = chunk.dots(direction, along)
        image = torch.mm(direction, shared.gramian, out=left).addcmul_(reg, direction)
        if step + 1 < steps:
            image += chunk.weighted_sum(torch.mul(along, w, out=terms))
            curvature = torch.mul(direction, image, out=right).sum(1)
        else:  # the last step needs no residual, and p'Ap no pass over the interactions' vectors
            curvature = torch.mul(direction, image, out=right).sum(1)
            curvature += chunk.row_sum(torch.square(along, out=terms).mul_(w))
        length = relaxation * rho / curvature.clamp_min_(_TINY)[:, None]
        x.addcmul_(length, direction)
        scores.addcmul_(along, chunk.per_interaction(length[:, 0], terms))
        if step + 1 < steps:
            residual.addcmul_(length, image, value=-1)
    return x, scores


def solve_cholesky(chunk: Chunk, shared: SharedTerms) -> tuple[torch.Tensor, torch.Tensor]:
    """Exact solution by Cholesky factors of explicit matrices, in batches of rows of similar degree. As `solve_cg`.

    Raises:
        SingularRow: the matrix of a row is not positive definite in float32.
    """
    x = torch.zeros_like(chunk.start)
    degree, order = torch.sort(chunk.degree)
    widths = degree.tolist()
    first = int((degree == 0).sum())  # empty rows stay zero
    while first < len(widths):
        last = first + 1
        while last < len(widths) and (last + 1 - first) * widths[last] <= _PADDED:
            last += 1
        rows, width = order[first:last], widths[last - 1]
        column = torch.arange(width, device=x.device)
        real = column < degree[first:last, None]  # (b, width); the others are padding
        entry = (chunk.indptr[:-1][rows, None] + column).clamp_(max=len(chunk.indices) - 1).long()
        weights = chunk.weights[entry] if isinstance(chunk.weights, torch.Tensor) else chunk.weights
        weights = weights * real
        others = chunk.table[chunk.indices[entry].long()]  # (b, width, d)
        target = ((weights + shared.unobserved_weight) * real)[:, None] @ others  # (b, 1, d)
        matrix = torch.baddbmm(shared.gramian, (others * weights[..., None]).transpose(1, 2), others)
        matrix.diagonal(dim1=1, dim2=2).add_(chunk.reg[rows, None])
        lower, info = torch.linalg.cholesky_ex(matrix)
        if bool(info.any()):
            raise SingularRow(int(rows[info.argmax()]))
        x[rows] = torch.cholesky_solve(target.transpose(1, 2), lower)[..., 0]
        first = last
    return x, chunk.dots(x)


class SingularRow(ValueError):
    """A row's normal equations are not positive definite in float32. `args[0]` is its number in the chunk."""


class HeavyRow:
    """Normal equations of a row with too many interactions for a chunk, summed in pieces and solved in float64."""

    def __init__(self, shared: SharedTerms, reg: torch.Tensor) -> None:
        """reg: regularization of the row, (1,), or (0,) for no row."""
        self.shared = shared
        self.common = shared.gramian.double()
        self.common.diagonal().add_(reg.sum())
        self.matrix = self.common.clone()
        self.target = self.common.new_zeros(len(self.common))
        self.total = self.common.new_zeros(())

    def add(self, piece: Chunk) -> None:
        """Add some interactions of the row, as a chunk of one row."""
        for first in range(0, len(piece.indices), 8192):  # float32 within a block, float64 between them
            part = piece.table[piece.indices[first : first + 8192].long()]
            w = piece.weights
            w = w[first : first + 8192] if isinstance(w, torch.Tensor) else part.new_full((len(part),), w)
            self.matrix += (part * w[:, None]).T @ part
            w = w + self.shared.unobserved_weight
            self.target += w @ part
            self.total += w.sum(dtype=torch.float64)

    def solve(self) -> tuple[torch.Tensor, float]:
        """The row (d,), and its loss as in `loss_of`. Waits for the device."""
        lower, info = torch.linalg.cholesky_ex(self.matrix)
        if int(info):
            raise SingularRow(0)
        x = torch.cholesky_solve(self.target[:, None], lower)[:, 0]
        # sum w (1 - s)^2 + w_0 (1 - 2 s) = sum (w + w_0) - 2 x.b + x'(sum w y y')x, where A x = b
        return x.float(), float(self.total) - float(x @ self.target) - float(x @ self.common @ x)


def loss_of(scores: torch.Tensor, weights: torch.Tensor | float, w0: float) -> float | torch.Tensor:
    """Loss of the interactions minus their part of sum_all w_0 s^2: sum w (1 - s)^2 + w_0 (1 - 2 s).

    On CUDA a tensor, for which the host does not wait.
    """
    error = (1 - scores).square_().mul_(weights).add_(scores, alpha=-2 * w0)
    if not host_reads(scores):
        return error.sum(dtype=torch.float64) + w0 * len(scores)
    # in parts, because torch casts a copy of what it sums
    return float(sum(part.sum(dtype=torch.float64) for part in error.split(1 << 13))) + w0 * len(scores)
