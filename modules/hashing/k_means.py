"""Weighted k-means in bounded memory, for up to hundreds of millions of ids and tens of millions of rows."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch

from recpress.modules.hashing.table_stats import ProgressFn
from recpress.modules.row_source import LARGEST, RowSource, blocks, gather_rows

CELL = 1 << 22
"""Most distances per pass over a cell: its ids times its rows."""
ROUNDS = 5
"""Successive partitions into cells, each with different boundaries. They share the iterations."""
BUFFER_BYTES = 2 << 30
"""Memory for the vectors of the cells that one pass over the matrix reads."""
SAMPLE = 64
"""Sampled ids per cell, from which a partition is learned."""
CHUNK = 1 << 18
"""Distances to compute at once; they stay in the cache."""


@dataclass(frozen=True, eq=False)
class Clustering:
    """A row for each id."""

    assignment: torch.Tensor
    """(n,) int32 in [0, k)."""
    centers: torch.Tensor
    """(k, d) float32: the weighted mean of the members of each row; arbitrary for a row without members."""
    distortion: float
    """sum_i w_i |v_i - c_assignment(i)|^2."""
    history: list[float] = field(default_factory=list)
    """The distortion after each round, or after each iteration if all ids fit in one cell. It never rises."""


def k_means(
    embedding: RowSource,
    weights: torch.Tensor | None,
    k: int,
    *,
    seed: int,
    iterations: int,
    name: str = "",
    buffer_bytes: int = BUFFER_BYTES,
    progress: ProgressFn | None = None,
) -> Clustering:
    """Weighted k-means of the rows of a matrix, read in blocks. Minimizes sum_i w_i |v_i - c_a(i)|^2.

    If n k is above `CELL`:
    1. A tree of one or two levels of k-means, learned from a sample, cuts the ids into cells. Each cell gets a share
       of the k rows, and k-means runs inside each cell (`lloyd`). A cell with distortion T about its single center gets
       a share in proportion to T^(d / (d + 2)). That is optimal for a density that is constant within each cell
       (Zador 1982), where a cell's distortion is in proportion to its rows to the power -2 / d.
    2. In each later round, the rows are cut into new cells with different boundaries. Each id follows its row, and
       k-means continues from there. So boundaries move, and rows with them.

    Memory in addition to the source: 4 bytes (2 n + n for the weights + k d) + `buffer_bytes` (or one cell of about
    sqrt(CELL n / k) ids, if that is larger) + 64 MiB. Time: about iterations * sqrt(CELL n k) * d multiplications.
    The same seed gives the same rows. Weights are at least a millionth of their mean.

    Args:
        embedding: (n, d), finite.
        weights: (n,), finite and >= 0, or None for ones.
        k: number of rows, 1 to n.
        iterations: passes over the ids.
        name: table that errors name.
        progress: called after each block and each cell.

    Raises:
        ValueError: sizes do not fit; a row is not finite, or too large.
    """
    n = embedding.shape[0]
    if not 1 <= k <= n:
        raise ValueError(f"table {name!r}: {k} clusters of {n} ids, expected 1 to {n}")
    if weights is not None and weights.shape != (n,):
        raise ValueError(f"table {name!r}: weights have shape {tuple(weights.shape)}, expected ({n},)")
    if iterations < 1:
        raise ValueError(f"table {name!r}: {iterations} iterations, expected at least 1")
    work = _Work(embedding, _floored(weights, n), name, buffer_bytes, progress)
    random = torch.Generator().manual_seed(seed)
    if k == n:
        return Clustering(torch.arange(n, dtype=torch.int32), torch.cat([x for _, x in work.blocks()]), 0.0, [0.0])
    leaves = math.ceil(math.sqrt(n * k / CELL))
    if leaves == 1:
        _, x, w = next(iter(work.cells(torch.zeros(n, dtype=torch.int32), 1, "k-means")))
        return lloyd(x, w, k, seed=seed, iterations=iterations)
    assignment, centers, distortion = _first_round(work, k, leaves, _share(iterations, 0), random)
    history = [distortion]
    for turn in range(1, ROUNDS):
        if share := _share(iterations, turn):
            distortion = _next_round(work, assignment, centers, leaves, share, turn, random)
            history.append(distortion)
    return Clustering(assignment, centers, distortion, history)


def lloyd(
    x: torch.Tensor,
    weights: torch.Tensor,
    k: int,
    *,
    seed: int,
    iterations: int,
    centers: torch.Tensor | None = None,
) -> Clustering:
    """Weighted k-means in memory: Lloyd's iterations, with exchanges of rows between them.

    Merging rows p and q costs  w_p w_q / (w_p + w_q) |c_p - c_q|^2  of distortion (Ward 1963). An exclusive row for an
    id i of row p gains  w_i w_p / (w_p - w_i) |v_i - c_p|^2. After each iteration, the cheapest merges of mutually
    nearest rows free rows for the ids with the largest gain, while the gain exceeds the cost. So an id gets a row to
    itself if that is the best use of the row. No step raises the distortion.

    Args:
        x: (n, d) float32.
        weights: (n,) float32, > 0.
        centers: (k, d) initial centers; None draws them (`_spread`).
    """
    random = torch.Generator().manual_seed(seed)
    centers = _spread(x, weights, k, random) if centers is None else centers.clone()
    history: list[float] = []
    before: torch.Tensor | None = None
    for turn in range(iterations):
        assignment = nearest(x, centers)
        mass, centers = means(x, weights, assignment, centers)
        distance = (x - centers[assignment]).square_().sum(1)
        history.append(float((distance * weights).sum(dtype=torch.float64)))
        if turn == iterations - 1 or (before is not None and torch.equal(before, assignment)):
            break
        before = assignment
        if k > 1:
            swapped = _exchange(x, weights, assignment, distance, mass, centers)
            if swapped:
                before = None
    return Clustering(assignment.to(torch.int32), centers, history[-1], history)


def nearest(x: torch.Tensor, centers: torch.Tensor) -> torch.Tensor:
    """Index of the nearest center by Euclidean distance: (n, d), (k, d) -> (n,) int64. The lowest index wins a tie."""
    k = len(centers)
    half = -(centers * centers).sum(1) / 2
    turned = centers.T.contiguous()
    step = max(16, CHUNK // k)
    scores = torch.empty(min(step, len(x)), k)
    found = torch.empty(len(x), dtype=torch.int64)
    for first in range(0, len(x), step):
        part = x[first : first + step]
        out = torch.addmm(half, part, turned, out=scores[: len(part)])
        # numpy's argmax over the last dimension is several times faster than torch's
        np.argmax(out.numpy(), axis=1, out=found[first : first + step].numpy())
    return found


def means(
    x: torch.Tensor, weights: torch.Tensor, assignment: torch.Tensor, empty: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight (k,) and weighted mean (k, d) of each row's members. A row without members keeps its mean in `empty`."""
    mass = torch.zeros(len(empty)).index_add_(0, assignment, weights)
    sums = torch.zeros_like(empty).index_add_(0, assignment, x * weights[:, None])
    return mass, torch.where(mass[:, None] > 0, sums / mass[:, None].clamp_min(torch.finfo().tiny), empty)


def _exchange(
    x: torch.Tensor,
    weights: torch.Tensor,
    assignment: torch.Tensor,
    distance: torch.Tensor,
    mass: torch.Tensor,
    centers: torch.Tensor,
) -> int:
    """Move rows without members, and rows freed by merges, to single ids. Returns how many moved.

    Changes `centers`. At most one id leaves a row, and no row both merges and loses an id, so that gains add up.
    """
    k = len(centers)
    rest = mass[assignment] - weights
    # If a member has nearly all of its row's weight, the row is exclusive up to rounding, and nothing is gained.
    gain = weights * distance * torch.where(rest > 1e-6 * weights, mass[assignment] / rest, 0.0)
    best = torch.zeros(k).scatter_reduce_(0, assignment, gain, "amax")
    is_best = ((gain == best[assignment]) & (gain > 0)).nonzero()[:, 0]
    holder = torch.full((k,), len(x)).scatter_reduce_(0, assignment[is_best], is_best, "amin")
    spare = (mass == 0).nonzero()[:, 0]
    first, second, cost = _cheapest_merges(mass, centers)
    # Rows without members cost nothing, so they come first.
    cost = torch.cat([torch.zeros(len(spare)), cost])
    freed = torch.cat([spare, second])
    kept = torch.cat([torch.full_like(spare, -1), first])
    donors = torch.sort(best, descending=True, stable=True).indices
    pays = _paying(best[donors], cost)
    busy = torch.zeros(k, dtype=torch.bool)
    busy[freed[:pays]] = True
    busy[kept[len(spare) : pays]] = True
    donors = donors[~busy[donors]]
    pays = _paying(best[donors], cost[:pays])
    for_merge = slice(len(spare), max(pays, len(spare)))
    p, q = kept[for_merge], freed[for_merge]
    total = mass[p] + mass[q]
    centers[p] = (centers[p] * mass[p, None] + centers[q] * mass[q, None]) / total[:, None]
    ids = holder[donors[:pays]]
    loses = donors[:pays]
    left = (mass[loses] - weights[ids])[:, None]
    centers[loses] = (centers[loses] * mass[loses, None] - x[ids] * weights[ids, None]) / left
    centers[freed[:pays]] = x[ids]
    return pays


def _paying(gain: torch.Tensor, cost: torch.Tensor) -> int:
    """How many of the gains, sorted descending, exceed the costs, sorted ascending."""
    both = min(len(gain), len(cost))
    return int((gain[:both] > cost[:both]).sum())


def _cheapest_merges(mass: torch.Tensor, centers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Pairs of rows that are each other's cheapest merge: (kept, freed, cost), sorted by cost."""
    k = len(centers)
    half = (centers * centers).sum(1) / 2
    partner = torch.empty(k, dtype=torch.int64)
    inverse = 1 / mass.clamp_min(torch.finfo().tiny)
    step = max(16, CHUNK // k)
    for start in range(0, k, step):
        part = slice(start, min(start + step, k))
        # -cost = (c_p . c_q - |c_p|^2 / 2 - |c_q|^2 / 2) / (1 / w_p + 1 / w_q), up to a factor of 2
        closeness = torch.addmm(-half, centers[part], centers.T).sub_(half[part, None]).clamp_max_(0)
        closeness.div_(inverse[part, None] + inverse)
        closeness[:, mass == 0] = -torch.inf
        closeness[torch.arange(part.stop - start), torch.arange(start, part.stop)] = -torch.inf
        np.argmax(closeness.numpy(), axis=1, out=partner[part].numpy())
    rows = torch.arange(k)
    mutual = rows[(partner[partner] == rows) & (rows < partner) & (mass > 0) & (mass[partner] > 0)]
    other = partner[mutual]
    cost = (centers[mutual] - centers[other]).square().sum(1) / (inverse[mutual] + inverse[other])
    order = torch.sort(cost, stable=True).indices
    return mutual[order], other[order], cost[order]


def _spread(x: torch.Tensor, weights: torch.Tensor, k: int, random: torch.Generator) -> torch.Tensor:
    """k rows of x as initial centers, drawn in 8 batches in proportion to w |v - nearest drawn so far|^2.

    This is k-means|| (Bahmani et al. 2012) without the clustering of its candidates.
    """
    batches = min(8, k)
    chosen: list[torch.Tensor] = []
    distance = torch.ones(len(x))
    for batch in range(batches):
        number = k * (batch + 1) // batches - k * batch // batches
        # The largest log(u) / p are a sample without replacement in proportion to p (Efraimidis, Spirakis 2006).
        draw = torch.rand(len(x), generator=random).clamp_min_(torch.finfo().tiny).log_()
        draw /= (weights * distance).clamp_min_(torch.finfo().tiny)
        taken = torch.topk(draw, number).indices
        chosen.append(taken)
        if batch < batches - 1:
            centers = x[taken]
            found = (x - centers[nearest(x, centers)]).square_().sum(1)
            distance = found if batch == 0 else torch.minimum(distance, found)
    return x[torch.cat(chosen)]


class _Tree:
    """A partition of space into cells by nearest centers. Many cells are found in two levels."""

    def __init__(self, sample: torch.Tensor, cells: int, random: torch.Generator) -> None:
        top = cells if cells <= 256 else math.ceil(math.sqrt(cells))
        self.top = _plain(sample, top, random)
        self.low: list[torch.Tensor] = []
        self.starts = [0]
        if top == cells:
            self.cells = len(self.top)
            return
        of = nearest(sample, self.top)
        for cell in range(len(self.top)):
            inside = sample[of == cell]
            # In proportion to its ids, so that cells have similar sizes.
            self.low.append(_plain(inside, max(1, round(cells * len(inside) / len(sample))), random))
            self.starts.append(self.starts[-1] + len(self.low[-1]))
        self.cells = self.starts[-1]

    def assign(self, x: torch.Tensor) -> torch.Tensor:
        """(n, d) -> cell, (n,) int32."""
        top = nearest(x, self.top)
        if not self.low:
            return top.to(torch.int32)
        found = torch.empty(len(x), dtype=torch.int32)
        order = torch.sort(top, stable=True).indices
        start = 0
        for cell, size in enumerate(torch.bincount(top, minlength=len(self.top)).tolist()):
            ids = order[start : start + size]
            start += size
            if size:
                found[ids] = (nearest(x[ids], self.low[cell]) + self.starts[cell]).to(torch.int32)
        return found

    def centers(self) -> torch.Tensor:
        """(cells, d)."""
        return torch.cat(self.low) if self.low else self.top


def _plain(sample: torch.Tensor, k: int, random: torch.Generator) -> torch.Tensor:
    """Up to k centers by a few plain iterations of Lloyd. Drops centers that lose all members."""
    centers = sample[torch.randperm(len(sample), generator=random)[:k]]
    ones = torch.ones(len(sample))
    for _ in range(5):
        mass, centers = means(sample, ones, nearest(sample, centers), centers)
        centers = centers[mass > 0]
    return centers


@dataclass(frozen=True)
class _Work:
    """The matrix and its weights, with the ways to read them."""

    embedding: RowSource
    weights: torch.Tensor | None
    name: str
    buffer_bytes: int
    progress: ProgressFn | None

    @property
    def shape(self) -> tuple[int, int]:
        return self.embedding.shape[0], self.embedding.shape[1]

    def blocks(self) -> Iterator[tuple[int, torch.Tensor]]:
        """(first id, vectors). Raises ValueError if a vector is not finite, or so large that distances overflow."""
        n, d = self.shape
        return blocks(self.embedding, self.name, (0, n), (0, d), largest=LARGEST)

    def weight(self, ids: slice | torch.Tensor, number: int) -> torch.Tensor:
        """Weights of `number` ids, float32."""
        return torch.ones(number) if self.weights is None else self.weights[ids]

    def report(self, stage: str, done: int) -> None:
        if self.progress is not None:
            self.progress(stage, done, self.shape[0])

    def cells(
        self, cell: torch.Tensor, number: int, stage: str
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """(ids, vectors, weights) of each cell 0 .. number - 1, with ascending ids. `cell` is (n,) int32.

        One pass over the matrix fills as many cells as the buffer holds.
        """
        _, d = self.shape
        sizes = torch.zeros(number, dtype=torch.int64)
        for part in cell.split(1 << 22):
            sizes += torch.bincount(part, minlength=number)
        ends = sizes.cumsum(0)
        limit = max(1, self.buffer_bytes // (4 * d + 16))
        done = 0
        low = 0
        while low < number:
            start = int(ends[low - 1]) if low else 0
            high = max(low + 1, int(torch.searchsorted(ends, start + limit, right=True)))
            group = int(ends[high - 1]) - start
            x, ids = torch.empty(group, d), torch.empty(group, dtype=torch.int64)
            free = torch.cat([torch.zeros(1, dtype=torch.int64), ends[low : high - 1] - start])
            for first, block in self.blocks():
                of = cell[first : first + len(block)]
                mine = ((of >= low) & (of < high)).nonzero()[:, 0]
                of = of[mine].long() - low
                order = torch.sort(of, stable=True).indices
                of, mine = of[order], mine[order]
                here = torch.bincount(of, minlength=high - low)
                at = torch.arange(len(mine)) + (free - here.cumsum(0) + here)[of]
                free += here
                x[at], ids[at] = block[mine], mine + first
            stop = 0
            for size in sizes[low:high].tolist():
                part = slice(stop, stop + size)
                stop += size
                yield ids[part], x[part], self.weight(ids[part], size)
                done += size
                self.report(stage, done)
            low = high


def _first_round(
    work: _Work, k: int, leaves: int, iterations: int, random: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Cut ids into cells, share the rows between cells, and cluster each: assignment, centers, distortion."""
    n, d = work.shape
    picked = torch.sort(torch.randint(n, (min(n, SAMPLE * leaves),), generator=random)).values
    sample = gather_rows(work.embedding, picked)
    if not bool((sample.abs() <= LARGEST).all()):  # false for NaN, too
        for _ in work.blocks():
            pass  # raises an error that names the row
    tree = _Tree(sample, leaves, random)
    cell = torch.empty(n, dtype=torch.int32)
    middle = tree.centers()
    spread = torch.zeros(tree.cells, dtype=torch.float64)
    sizes = torch.zeros(tree.cells, dtype=torch.int64)
    for first, block in work.blocks():
        of = tree.assign(block)
        cell[first : first + len(block)] = of
        away = (block - middle[of]).square_().sum(1) * work.weight(slice(first, first + len(block)), len(block))
        spread.index_add_(0, of, away.double())
        sizes += torch.bincount(of, minlength=tree.cells)
        work.report("partition", first + len(block))
    rows = _shares(spread ** (d / (d + 2)), sizes, k)
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), rows.cumsum(0)]).tolist()
    assignment = torch.empty(n, dtype=torch.int32)
    centers = torch.empty(k, d)
    distortion = 0.0
    for leaf, (ids, x, w) in enumerate(work.cells(cell, tree.cells, f"k-means 1/{ROUNDS}")):
        if len(ids):
            found = lloyd(x, w, starts[leaf + 1] - starts[leaf], seed=_draw(random), iterations=iterations)
            assignment[ids] = found.assignment + starts[leaf]
            centers[starts[leaf] : starts[leaf + 1]] = found.centers
            distortion += found.distortion
    return assignment, centers, distortion


def _next_round(
    work: _Work,
    assignment: torch.Tensor,
    centers: torch.Tensor,
    leaves: int,
    iterations: int,
    turn: int,
    random: torch.Generator,
) -> float:
    """Cut rows into cells and cluster each with its ids. Changes assignment and centers; returns the distortion."""
    k = len(centers)
    tree = _Tree(centers[torch.randperm(k, generator=random)[: SAMPLE * leaves]], leaves, random)
    of_row = torch.cat([tree.assign(part) for part in centers.split(1 << 20)])
    members = torch.sort(of_row, stable=True).indices
    sizes = torch.bincount(of_row, minlength=tree.cells)
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), sizes.cumsum(0)]).tolist()
    cell = torch.empty_like(assignment)
    for first in range(0, len(cell), 1 << 22):
        part = slice(first, first + (1 << 22))
        cell[part] = of_row[assignment[part]]
    distortion = 0.0
    for leaf, (ids, x, w) in enumerate(work.cells(cell, tree.cells, f"k-means {turn + 1}/{ROUNDS}")):
        if len(ids):
            rows = members[starts[leaf] : starts[leaf + 1]]
            found = lloyd(x, w, len(rows), seed=_draw(random), iterations=iterations, centers=centers[rows])
            assignment[ids] = rows[found.assignment].to(torch.int32)
            centers[rows] = found.centers
            distortion += found.distortion
    return distortion


def _shares(earned: torch.Tensor, sizes: torch.Tensor, k: int) -> torch.Tensor:
    """Split k rows over cells in proportion to `earned`: (cells,) int64, 1 to its ids for each cell with ids."""
    rows = (sizes > 0).long()
    if int(rows.sum()) > k:
        raise ValueError(f"{k} rows for {int(rows.sum())} cells")
    want = earned.double() + 1e-12 * max(float(earned.max()), 1e-30)
    for _ in range(64):
        left = k - int(rows.sum())
        room = (sizes - rows).clamp_min(0)
        if not left:
            break
        want = torch.where(room > 0, want, 0.0)
        # Water filling: the next turn gives what a full cell cannot take to the others.
        add = torch.minimum((left * want / want.sum()).floor().long(), room)
        if not int(add.sum()):
            order = torch.sort(torch.where(room > 0, want / (rows + 1), -1.0), descending=True, stable=True).indices
            add[order[: min(left, int((room > 0).sum()))]] = 1
        rows += add
    return rows


def _share(iterations: int, turn: int) -> int:
    """Iterations of one round: half of them in the first, the rest split evenly over the later ones."""
    first = max(1, (iterations + 1) // 2)
    if turn == 0:
        return first
    later = iterations - first
    return later * turn // (ROUNDS - 1) - later * (turn - 1) // (ROUNDS - 1)


def _floored(weights: torch.Tensor | None, n: int) -> torch.Tensor | None:
    """Weights as float32, at least a millionth of the mean, so that ids of weight 0 still join the nearest row."""
    if weights is None:
        return None
    mean = float(weights.sum(dtype=torch.float64)) / n
    return weights.float().clamp_min(1e-6 * mean) if mean > 0 else None


def _draw(random: torch.Generator) -> int:
    return int(torch.randint(1 << 62, (1,), generator=random))
