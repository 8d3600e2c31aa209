"""Weighted k-means that scales: ids in the hundreds of millions to rows in the tens of millions, in bounded memory."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch

from recpress.modules.hashing.problem import Progress
from recpress.modules.rows import LARGEST, RowSource, blocks

CELL = 1 << 22
"""Distances of one pass over a cell: its ids times its rows."""
ROUNDS = 5
"""Partitions into cells, one after the other, each with other borders; they share the iterations."""
BUFFER_BYTES = 2 << 30
"""Memory for the vectors of the cells that are worked on together."""
SAMPLE = 64
"""Ids of the sample that a partition is learned from, for each cell of it."""
CHUNK = 1 << 18
"""Distances computed at a time, few enough to stay in the cache."""


@dataclass(frozen=True, eq=False)
class Clustering:
    """Rows of ids.

    assignment: (n,) int32 in [0, k); centres: (k, d) float32, the weighted mean of the members of each row, a row
    without members arbitrary; distortion: sum_i w_i |v_i - c_assignment(i)|^2; history: of the distortion, a value
    for each round, or for each iteration where the ids fit into one cell. It never rises.
    """

    assignment: torch.Tensor
    centres: torch.Tensor
    distortion: float
    history: list[float] = field(default_factory=list)


def cluster(
    embedding: RowSource,
    weights: torch.Tensor | None,
    k: int,
    *,
    seed: int,
    iterations: int,
    name: str = "",
    buffer_bytes: int = BUFFER_BYTES,
    progress: Progress | None = None,
) -> Clustering:
    """Weighted k-means of the rows of a matrix, which is read in blocks.

    Minimises sum_i w_i |v_i - c_a(i)|^2. Where n k is above `CELL`, the ids are cut into cells (a tree of one or two
    levels of k-means, learned from a sample), each cell gets its share of the k rows, and k-means runs inside each
    cell (`lloyd`). Then the rows are cut into cells anew, with other borders, each id goes where its row goes, and
    k-means runs on from where it is; so borders move, and rows with them. The first share of a cell with distortion T
    about its one centre is in proportion to T^(d / (d + 2)), which is best for a density that is flat within each
    cell (Zador 1982): a cell's distortion falls as its rows to the power -2 / d.

    Memory beside the source: 4 bytes (2 n + n for the weights + k d) + `buffer_bytes` (or, if larger, one cell, which
    has about sqrt(CELL n / k) ids) + 64 MiB. Time: about iterations * sqrt(CELL n k) * d multiplications.
    The same seed gives the same rows. Weights below a millionth of their mean count as that.

    Args:
        embedding: (n, d), finite.
        weights: (n,), finite and >= 0, or None for ones.
        k: rows, 1 to n.
        iterations: passes over the ids.
        name: table that an error names.
        progress: called after each block and each cell.

    Raises:
        ValueError: a row that is not finite; sizes that do not fit.
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
        _, x, w = next(iter(work.cells(torch.zeros(n, dtype=torch.int32), 1, "cluster")))
        return lloyd(x, w, k, seed=seed, iterations=iterations)
    assignment, centres, distortion = _first_round(work, k, leaves, _share(iterations, 0), random)
    history = [distortion]
    for turn in range(1, ROUNDS):
        if share := _share(iterations, turn):
            distortion = _next_round(work, assignment, centres, leaves, share, turn, random)
            history.append(distortion)
    return Clustering(assignment, centres, distortion, history)


def lloyd(
    x: torch.Tensor,
    weights: torch.Tensor,
    k: int,
    *,
    seed: int,
    iterations: int,
    centres: torch.Tensor | None = None,
) -> Clustering:
    """Weighted k-means in memory: Lloyd's iterations, and between them exchanges of rows that pay.

    Merging the rows p and q costs  w_p w_q / (w_p + w_q) |c_p - c_q|^2  of distortion (Ward 1963); giving an id i of
    row p a row for itself gains  w_i w_p / (w_p - w_i) |v_i - c_p|^2. After each iteration the cheapest merges of
    mutual nearest rows pay for the dearest ids, as long as the gain is above the cost. So an id has a row for itself
    where that is the best use of the row. Every step lowers the distortion or leaves it.

    Args:
        x: (n, d) float32.
        weights: (n,) float32, above 0.
        centres: (k, d) to start from; None draws them (`_spread`).
    """
    random = torch.Generator().manual_seed(seed)
    centres = _spread(x, weights, k, random) if centres is None else centres.clone()
    history: list[float] = []
    before: torch.Tensor | None = None
    for turn in range(iterations):
        assignment = nearest(x, centres)
        mass, centres = means(x, weights, assignment, centres)
        distance = (x - centres[assignment]).square_().sum(1)
        history.append(float((distance * weights).sum(dtype=torch.float64)))
        if turn == iterations - 1 or (before is not None and torch.equal(before, assignment)):
            break
        before = assignment
        if k > 1:
            swapped = _exchange(x, weights, assignment, distance, mass, centres)
            if swapped:
                before = None
    return Clustering(assignment.to(torch.int32), centres, history[-1], history)


def nearest(x: torch.Tensor, centres: torch.Tensor) -> torch.Tensor:
    """Index of the nearest centre by Euclidean distance, ties by the lowest: (n, d), (k, d) -> (n,) int64."""
    k = len(centres)
    half = -(centres * centres).sum(1) / 2
    turned = centres.T.contiguous()
    step = max(16, CHUNK // k)
    scores = torch.empty(min(step, len(x)), k)
    found = torch.empty(len(x), dtype=torch.int64)
    for first in range(0, len(x), step):
        part = x[first : first + step]
        out = torch.addmm(half, part, turned, out=scores[: len(part)])
        # numpy's argmax over the last dimension is several times as fast as torch's
        np.argmax(out.numpy(), axis=1, out=found[first : first + step].numpy())
    return found


def means(
    x: torch.Tensor, weights: torch.Tensor, assignment: torch.Tensor, empty: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight and weighted mean of each row's members, (k,) and (k, d); those of `empty` (k, d) where it has none."""
    mass = torch.zeros(len(empty)).index_add_(0, assignment, weights)
    sums = torch.zeros_like(empty).index_add_(0, assignment, x * weights[:, None])
    return mass, torch.where(mass[:, None] > 0, sums / mass[:, None].clamp_min(torch.finfo().tiny), empty)


def _exchange(
    x: torch.Tensor,
    weights: torch.Tensor,
    assignment: torch.Tensor,
    distance: torch.Tensor,
    mass: torch.Tensor,
    centres: torch.Tensor,
) -> int:
    """Free rows by merging, or take rows that have no members, and put them onto ids; returns how many.

    Changes `centres`. At most one id leaves a row, and no row both merges and loses an id, so that gains add up.
    """
    k = len(centres)
    rest = mass[assignment] - weights
    # A member's weight may be all of its row's but for rounding: then the row is its own, or as good as that.
    gain = weights * distance * torch.where(rest > 1e-6 * weights, mass[assignment] / rest, 0.0)
    best = torch.zeros(k).scatter_reduce_(0, assignment, gain, "amax")
    is_best = ((gain == best[assignment]) & (gain > 0)).nonzero()[:, 0]
    holder = torch.full((k,), len(x)).scatter_reduce_(0, assignment[is_best], is_best, "amin")
    spare = (mass == 0).nonzero()[:, 0]
    first, second, cost = _cheapest_merges(mass, centres)
    # Spare rows cost nothing and come first.
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
    centres[p] = (centres[p] * mass[p, None] + centres[q] * mass[q, None]) / total[:, None]
    ids = holder[donors[:pays]]
    loses = donors[:pays]
    left = (mass[loses] - weights[ids])[:, None]
    centres[loses] = (centres[loses] * mass[loses, None] - x[ids] * weights[ids, None]) / left
    centres[freed[:pays]] = x[ids]
    return pays


def _paying(gain: torch.Tensor, cost: torch.Tensor) -> int:
    """How many of the highest gains, sorted down, are above the lowest costs, sorted up."""
    both = min(len(gain), len(cost))
    return int((gain[:both] > cost[:both]).sum())


def _cheapest_merges(mass: torch.Tensor, centres: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Pairs of rows that are each other's cheapest to merge with: (kept, freed, cost), by cost."""
    k = len(centres)
    half = (centres * centres).sum(1) / 2
    partner = torch.empty(k, dtype=torch.int64)
    inverse = 1 / mass.clamp_min(torch.finfo().tiny)
    step = max(16, CHUNK // k)
    for start in range(0, k, step):
        part = slice(start, min(start + step, k))
        # -cost = (c_p . c_q - |c_p|^2 / 2 - |c_q|^2 / 2) / (1 / w_p + 1 / w_q), up to a factor of 2
        closeness = torch.addmm(-half, centres[part], centres.T).sub_(half[part, None]).clamp_max_(0)
        closeness.div_(inverse[part, None] + inverse)
        closeness[:, mass == 0] = -torch.inf
        closeness[torch.arange(part.stop - start), torch.arange(start, part.stop)] = -torch.inf
        np.argmax(closeness.numpy(), axis=1, out=partner[part].numpy())
    rows = torch.arange(k)
    mutual = rows[(partner[partner] == rows) & (rows < partner) & (mass > 0) & (mass[partner] > 0)]
    other = partner[mutual]
    cost = (centres[mutual] - centres[other]).square().sum(1) / (inverse[mutual] + inverse[other])
    order = torch.sort(cost, stable=True).indices
    return mutual[order], other[order], cost[order]


def _spread(x: torch.Tensor, weights: torch.Tensor, k: int, random: torch.Generator) -> torch.Tensor:
    """k rows of x to start from, drawn in 8 batches in proportion to w |v - nearest so far|^2.

    k-means|| (Bahmani et al. 2012) without the clustering of its candidates.
    """
    batches = min(8, k)
    chosen: list[torch.Tensor] = []
    distance = torch.ones(len(x))
    for batch in range(batches):
        number = k * (batch + 1) // batches - k * batch // batches
        # The largest of log(u) / p are a draw without replacement in proportion to p (Efraimidis, Spirakis 2006).
        draw = torch.rand(len(x), generator=random).clamp_min_(torch.finfo().tiny).log_()
        draw /= (weights * distance).clamp_min_(torch.finfo().tiny)
        taken = torch.topk(draw, number).indices
        chosen.append(taken)
        if batch < batches - 1:
            centres = x[taken]
            found = (x - centres[nearest(x, centres)]).square_().sum(1)
            distance = found if batch == 0 else torch.minimum(distance, found)
    return x[torch.cat(chosen)]


class _Tree:
    """A partition of space into cells by nearest centres, of one level, or of two where there are many."""

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
            # In proportion to its ids, so that cells come out alike in size.
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

    def centres(self) -> torch.Tensor:
        """(cells, d)."""
        return torch.cat(self.low) if self.low else self.top


def _plain(sample: torch.Tensor, k: int, random: torch.Generator) -> torch.Tensor:
    """Up to k centres by a few plain iterations of Lloyd; those that lose all members are left out."""
    centres = sample[torch.randperm(len(sample), generator=random)[:k]]
    ones = torch.ones(len(sample))
    for _ in range(5):
        mass, centres = means(sample, ones, nearest(sample, centres), centres)
        centres = centres[mass > 0]
    return centres


@dataclass(frozen=True)
class _Work:
    """The matrix and its weights, and ways to go over them."""

    embedding: RowSource
    weights: torch.Tensor | None
    name: str
    buffer_bytes: int
    progress: Progress | None

    @property
    def shape(self) -> tuple[int, int]:
        return self.embedding.shape[0], self.embedding.shape[1]

    def blocks(self) -> Iterator[tuple[int, torch.Tensor]]:
        """(first id, vectors), finite, and not so large that distances overflow."""
        n, d = self.shape
        return blocks(self.embedding, self.name, (0, n), (0, d), largest=LARGEST)

    def gather(self, ids: torch.Tensor) -> torch.Tensor:
        """Vectors of ids, (len(ids), d) float32; memory maps want them in order."""
        found = self.embedding[ids if isinstance(self.embedding, torch.Tensor) else ids.numpy()]
        return found.float() if isinstance(found, torch.Tensor) else torch.from_numpy(np.array(found, np.float32))

    def weight(self, ids: slice | torch.Tensor, number: int) -> torch.Tensor:
        """Weights of `number` ids, float32."""
        return torch.ones(number) if self.weights is None else self.weights[ids]

    def tell(self, stage: str, done: int) -> None:
        if self.progress is not None:
            self.progress(stage, done, self.shape[0])

    def cells(
        self, cell: torch.Tensor, number: int, stage: str
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """(ids, vectors, weights) of each cell 0 .. number - 1 in turn, ids in order; `cell` is (n,) int32.

        As many cells as the buffer holds are filled by one pass over the matrix.
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
                self.tell(stage, done)
            low = high


def _first_round(
    work: _Work, k: int, leaves: int, iterations: int, random: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Cells by vector, a share of the rows to each, k-means inside: assignment, centres, distortion."""
    n, d = work.shape
    picked = torch.sort(torch.randint(n, (min(n, SAMPLE * leaves),), generator=random)).values
    sample = work.gather(picked)
    if not bool((sample.abs() <= LARGEST).all()):  # NaN is not either
        for _ in work.blocks():
            pass  # raises, and names the row
    tree = _Tree(sample, leaves, random)
    cell = torch.empty(n, dtype=torch.int32)
    middle = tree.centres()
    spread = torch.zeros(tree.cells, dtype=torch.float64)
    sizes = torch.zeros(tree.cells, dtype=torch.int64)
    for first, block in work.blocks():
        of = tree.assign(block)
        cell[first : first + len(block)] = of
        away = (block - middle[of]).square_().sum(1) * work.weight(slice(first, first + len(block)), len(block))
        spread.index_add_(0, of, away.double())
        sizes += torch.bincount(of, minlength=tree.cells)
        work.tell("partition", first + len(block))
    rows = _shares(spread ** (d / (d + 2)), sizes, k)
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), rows.cumsum(0)]).tolist()
    # The cell of an id is not needed once the cell is read; its row takes the place.
    assignment = torch.empty(n, dtype=torch.int32)
    centres = torch.empty(k, d)
    distortion = 0.0
    for leaf, (ids, x, w) in enumerate(work.cells(cell, tree.cells, f"cluster 1/{ROUNDS}")):
        if len(ids):
            found = lloyd(x, w, starts[leaf + 1] - starts[leaf], seed=_draw(random), iterations=iterations)
            assignment[ids] = found.assignment + starts[leaf]
            centres[starts[leaf] : starts[leaf + 1]] = found.centres
            distortion += found.distortion
    return assignment, centres, distortion


def _next_round(
    work: _Work,
    assignment: torch.Tensor,
    centres: torch.Tensor,
    leaves: int,
    iterations: int,
    turn: int,
    random: torch.Generator,
) -> float:
    """Cells of rows, each id where its row is, k-means inside; changes assignment and centres; the distortion."""
    k = len(centres)
    tree = _Tree(centres[torch.randperm(k, generator=random)[: SAMPLE * leaves]], leaves, random)
    of_row = torch.cat([tree.assign(part) for part in centres.split(1 << 20)])
    members = torch.sort(of_row, stable=True).indices
    sizes = torch.bincount(of_row, minlength=tree.cells)
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), sizes.cumsum(0)]).tolist()
    cell = torch.empty_like(assignment)
    for first in range(0, len(cell), 1 << 22):
        part = slice(first, first + (1 << 22))
        cell[part] = of_row[assignment[part]]
    distortion = 0.0
    for leaf, (ids, x, w) in enumerate(work.cells(cell, tree.cells, f"cluster {turn + 1}/{ROUNDS}")):
        if len(ids):
            rows = members[starts[leaf] : starts[leaf + 1]]
            found = lloyd(x, w, len(rows), seed=_draw(random), iterations=iterations, centres=centres[rows])
            assignment[ids] = rows[found.assignment].to(torch.int32)
            centres[rows] = found.centres
            distortion += found.distortion
    return distortion


def _shares(earned: torch.Tensor, sizes: torch.Tensor, k: int) -> torch.Tensor:
    """k rows to cells in proportion to `earned`, at least 1 to a cell with ids and at most its ids: (cells,) int64."""
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
        # Water filling: what a full cell cannot take goes to the others in the next turn.
        add = torch.minimum((left * want / want.sum()).floor().long(), room)
        if not int(add.sum()):
            order = torch.sort(torch.where(room > 0, want / (rows + 1), -1.0), descending=True, stable=True).indices
            add[order[: min(left, int((room > 0).sum()))]] = 1
        rows += add
    return rows


def _share(iterations: int, turn: int) -> int:
    """Iterations of one round: half of them in the first, where rows start anywhere, and the rest split."""
    first = max(1, (iterations + 1) // 2)
    if turn == 0:
        return first
    later = iterations - first
    return later * turn // (ROUNDS - 1) - later * (turn - 1) // (ROUNDS - 1)


def _floored(weights: torch.Tensor | None, n: int) -> torch.Tensor | None:
    """Weights as float32, none below a millionth of the mean, so that ids of weight 0 still go where they fit."""
    if weights is None:
        return None
    mean = float(weights.sum(dtype=torch.float64)) / n
    return weights.float().clamp_min(1e-6 * mean) if mean > 0 else None


def _draw(random: torch.Generator) -> int:
    return int(torch.randint(1 << 62, (1,), generator=random))
