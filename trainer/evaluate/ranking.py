"""Ranking metrics of a model over sharded tables, the same on any number of ranks.

Each rank holds the vectors of some item chunks. For a chunk of users, every rank counts the competitors among its
items that score at least as high as the held-out items, and the counts are all-reduced. The result does not depend on
the world size, the chunks, or the order of addition:

- users and items pass through the model in chunks of fixed content and shape;
- a score is a float64 dot product rounded to float32, so that the order of addition does not break a tie (a GPU adds in
  float32, and in float64 again where the order could matter);
- metrics of users are added as integers, in units of 2**-32.

Ties count against the model. Memory per rank: its share of the item vectors (float32), one user chunk of every rank,
and a block of scores (chunk x item_chunk); never users x items.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from recpress.data.dataset.columns import Jagged
from recpress.data.errors import InputError
from recpress.modules.als.factors import FactorTable
from recpress.trainer.distributed.collectives import all_gather, all_gather_arrays, all_reduce, rank_and_world
from recpress.trainer.evaluate import metrics as ranking_metrics
from recpress.trainer.evaluate.heldout import FullHeldout, Heldout, SampledHeldout, ceil_div
from recpress.trainer.loop.precision import matmul_precision
from recpress.trainer.model.vectors import VectorFn

CPU = torch.device("cpu")
ITEM_CHUNK = 4096
_PAIRS = 1 << 10  # pairs scored together, padded to this number: one shape, one order of addition
_PAIRS_ON_DEVICE = 1 << 16  # the same on a GPU, which few pairs do not fill
_UNIT = 1 << 32
_LARGEST = float(torch.finfo(torch.float32).max)


def evaluate_sampled(
    heldout: SampledHeldout,
    user_vectors: VectorFn,
    item_vectors: VectorFn,
    ks: Sequence[int] = (10,),
    *,
    item_chunk: int = ITEM_CHUNK,
    device: torch.device = CPU,
    per_case: dict[str, Tensor] | None = None,
) -> dict[str, float]:
    """Rank each held-out item among its negatives. Collective; the same result on every rank.

    Args:
        ks: cut-offs K.
        item_chunk: items per call of item_vectors.
        device: of the scores, and of the ids that the callables get.
        per_case: filled with each metric per case of this rank, (len(heldout.users),) float64, NaN if undefined.

    Returns:
        "HR@K", "NDCG@K", "Recall@K", "UncappedRecall@K" for each K, "MRR", "AUC" (means over the cases), "cases" and
        `heldout.facts`.

    Raises:
        InputError: nothing is held out; a vector that is not finite, naming its user or item. On every rank.
    """
    ranker = _Ranker(heldout, user_vectors, item_vectors, item_chunk, device)
    negatives = heldout.negatives

    def ahead(vectors: Tensor, arrays: Sequence[np.ndarray], target_scores: Tensor) -> Tensor:
        lengths, values = arrays
        rows = np.repeat(np.arange(len(lengths)), lengths)
        mine, scores = ranker.items.pair_scores(vectors, rows, values)
        rows_here = torch.from_numpy(rows[mine]).to(scores.device)
        return torch.bincount(rows_here[scores >= target_scores[rows_here]], minlength=len(lengths))

    def competitors(start: int, stop: int) -> np.ndarray:
        return negatives.lengths[start:stop]

    def arrays_of(start: int, stop: int) -> list[np.ndarray]:
        return [negatives.lengths[start:stop], _values(negatives, start, stop)]

    return ranker.run(arrays_of, ahead, competitors, ks, per_case)


def evaluate_full(
    heldout: FullHeldout,
    user_vectors: VectorFn,
    item_vectors: VectorFn,
    ks: Sequence[int] = (10,),
    *,
    item_chunk: int = ITEM_CHUNK,
    device: torch.device = CPU,
    per_case: dict[str, Tensor] | None = None,
) -> dict[str, float]:
    """Rank all items that the user has not seen. Collective; the same result on every rank.

    Held-out items of one user do not count against each other in AUC, and have different positions in the ranking.
    Recall@K = hits / min(K, held-out items of the user), and NDCG is normalized the same way; UncappedRecall@K = hits /
    held-out items of the user. A user without competitors
    (only seen and held-out items) has no AUC, and its mean is over the other users.

    Arguments, result and errors as in `evaluate_sampled`; means are over users with held-out items.
    """
    ranker = _Ranker(heldout, user_vectors, item_vectors, item_chunk, device)
    targets, seen = heldout.targets, heldout.seen

    def ahead(vectors: Tensor, arrays: Sequence[np.ndarray], target_scores: Tensor) -> Tensor:
        target_lengths, target_items, seen_lengths, seen_items = arrays
        target_rows = np.repeat(np.arange(len(target_lengths)), target_lengths)
        hidden_rows = np.concatenate([target_rows, np.repeat(np.arange(len(seen_lengths)), seen_lengths)])
        hidden_items = np.concatenate([target_items, seen_items])
        return ranker.items.count_ahead(vectors, target_rows, target_scores, hidden_rows, hidden_items)

    def competitors(start: int, stop: int) -> np.ndarray:
        return heldout.num_items - targets.lengths[start:stop] - seen.lengths[start:stop]

    def arrays_of(start: int, stop: int) -> list[np.ndarray]:
        arrays = []
        for lists in (targets, seen):
            arrays += [lists.lengths[start:stop], _values(lists, start, stop)]
        return arrays

    return ranker.run(arrays_of, ahead, competitors, ks, per_case)


def vectors_from_factors(factors: np.ndarray | FactorTable | Tensor) -> VectorFn:
    """Rows of a complete table, (n, D), in memory or on disk."""
    if isinstance(factors, Tensor):
        return lambda ids: factors[ids.to(factors.device)]
    return lambda ids: torch.from_numpy(np.asarray(factors[ids.cpu().numpy()])).to(ids.device)


class _Ranker:
    """The common part of the protocols: each rank passes one chunk of cases at a time, and all ranks count together."""

    def __init__(
        self,
        heldout: Heldout,
        user_vectors: VectorFn,
        item_vectors: VectorFn,
        item_chunk: int,
        device: torch.device,
    ):
        if heldout.num_cases == 0:
            raise InputError(_nothing(heldout))
        self.heldout = heldout
        self.user_vectors = user_vectors
        self.device = device
        self.items = ItemShard(item_vectors, heldout.num_items, item_chunk, self.device)

    @torch.no_grad()
    def run(
        self,
        arrays_of: Callable[[int, int], list[np.ndarray]],
        ahead: Callable[[Tensor, Sequence[np.ndarray], Tensor], Tensor],
        competitors: Callable[[int, int], np.ndarray],
        ks: Sequence[int],
        per_case: dict[str, Tensor] | None = None,
    ) -> dict[str, float]:
        """Sum the metrics of all cases.

        Args:
            arrays_of: what every rank needs of the cases [start, stop) of this rank, in addition to users and targets.
            ahead: user vectors (chunk, D), such arrays, scores of the targets (T,) -> for each target, how
                many competitors among the items of this rank rank ahead of it, (T,) int64.
            competitors: number of competitors of each of the cases [start, stop) of this rank.
        """
        heldout, (rank, _) = self.heldout, rank_and_world()
        sums: dict[str, list[int]] = {}
        each: dict[str, list[Tensor]] = {}
        for number in range(heldout.chunks_per_rank):
            start = min(number * heldout.chunk, len(heldout.users))
            stop = min(start + heldout.chunk, len(heldout.users))
            vectors = self._user_chunk(heldout.users[start:stop])
            targets = [heldout.targets.lengths[start:stop], _values(heldout.targets, start, stop)]
            known = all_gather_arrays([heldout.users[start:stop], *targets, *arrays_of(start, stop)])
            for of_rank, arrays in zip(vectors, known, strict=True):
                check_users(of_rank, arrays[0], self.items.largest_norm)
            scores = all_reduce(torch.cat([self._target_scores(v, a) for v, a in zip(vectors, known, strict=True)]))
            sizes = [len(arrays[2]) for arrays in known]
            per_rank = scores.split(sizes)
            counts = all_reduce(
                torch.cat([ahead(v, a[3:], s) for v, a, s in zip(vectors, known, per_rank, strict=True)])
            )
            rows = torch.from_numpy(np.repeat(np.arange(stop - start), targets[0]))
            values = user_metrics(
                per_rank[rank].cpu(),
                counts.split(sizes)[rank].cpu(),
                rows,
                torch.from_numpy(competitors(start, stop)),
                ks,
            )
            for name, value in values.items():
                each.setdefault(name, []).append(value)
                present = value[~value.isnan()]
                total = sums.setdefault(name, [0, 0])
                total[0] += int(torch.round(present * _UNIT).long().sum())
                total[1] += len(present)
        if per_case is not None:
            per_case |= {name: torch.cat(values) for name, values in each.items()}
        reduced = all_reduce(torch.tensor(list(sums.values()))).tolist()
        result = {
            name: total / (count * _UNIT) if count else float("nan")
            for name, (total, count) in zip(sums, reduced, strict=True)
        }
        return {
            **result,
            "cases": float(heldout.num_cases),
            **{k: float(v) for k, v in heldout.facts.items()},
        }

    def _user_chunk(self, users: np.ndarray) -> list[Tensor]:
        """The vectors of each rank's chunk of users, (chunk, D) each; rows beyond the users are zero."""
        ids = torch.zeros(self.heldout.chunk, dtype=torch.int64)
        ids[: len(users)] = torch.from_numpy(users)
        vectors = self.user_vectors(ids.to(self.device)).detach().to(self.device, torch.float32)
        if vectors.shape != (len(ids), self.items.dim):
            raise ValueError(
                f"user vectors {tuple(vectors.shape)}; expected ({len(ids)}, {self.items.dim}) as for items"
            )
        vectors = vectors.clone()
        vectors[len(users) :] = 0
        return all_gather(vectors)

    def _target_scores(self, vectors: Tensor, arrays: Sequence[np.ndarray]) -> Tensor:
        """Scores of the targets among the items of this rank, (T,); the others are 0."""
        _, lengths, items, *_ = arrays
        mine, scores = self.items.pair_scores(vectors, np.repeat(np.arange(len(lengths)), lengths), items)
        result = scores.new_zeros(len(items))
        result[torch.from_numpy(mine).to(result.device)] = scores
        return result


def check_users(vectors: Tensor, ids: np.ndarray, largest_norm: float) -> None:
    """Raise InputError, naming the user, if a score could be infinite or NaN.

    Args:
        vectors: (n, D); rows beyond the ids are zero.
        largest_norm: of the items.
    """
    norm = vectors.double().norm(dim=1)
    bad = ~(norm * largest_norm < _LARGEST)  # others cannot overflow (Cauchy-Schwarz)
    if bad.any():
        row = int(bad.nonzero()[0])
        why = "is too large" if norm[row].isfinite() else "is not finite"
        raise InputError(f"user {ids[row]}: its scores are not finite, because its vector {why}")


class ItemShard:
    """The item vectors of this rank: whole chunks, so that a block of scores is the same on any rank.

    It has the items [start, stop). `largest_norm` is that of all items.

    Raises:
        InputError: an item vector is not finite. On every rank.
    """

    def __init__(self, item_vectors: VectorFn, num_items: int, item_chunk: int, device: torch.device):
        rank, world = rank_and_world()
        chunks = ceil_div(ceil_div(num_items, item_chunk), world)
        self.chunk = item_chunk
        self.start = min(rank * chunks * item_chunk, num_items)
        self.stop = min(self.start + chunks * item_chunk, num_items)
        norms_of: list[Tensor] = []  # a chunk at a time: in float64 all vectors at once would take twice their memory
        with torch.no_grad():
            for number in range(chunks):
                first = (rank * chunks + number) * item_chunk
                ids = torch.arange(first, first + item_chunk, device=device)
                ids[ids >= num_items] = 0
                part = item_vectors(ids).detach().to(device, torch.float32)
                if number == 0:
                    self.vectors = part.new_empty(chunks * item_chunk, part.shape[1])
                    """(chunks * item_chunk, D) float32; rows beyond the items hold item 0."""
                self.vectors[number * item_chunk : (number + 1) * item_chunk] = part
                norms_of.append(part.double().norm(dim=1))
        self.dim = self.vectors.shape[1]
        norms = torch.cat(norms_of)[: self.stop - self.start]
        bad = (~norms.isfinite()).nonzero()
        first_bad = int(bad[0]) + self.start if len(bad) else num_items
        first_bad = int(all_reduce(torch.tensor([first_bad]), dist.ReduceOp.MIN))
        if first_bad < num_items:
            raise InputError(f"item {first_bad}: its vector is not finite")
        largest = norms.max().cpu() if len(norms) else torch.tensor(0.0, dtype=torch.float64)
        self.largest_norm = float(all_reduce(largest.reshape(1), dist.ReduceOp.MAX))

    def pair_scores(self, vectors: Tensor, rows: np.ndarray, items: np.ndarray) -> tuple[np.ndarray, Tensor]:
        """Which of the pairs (row item) have their item here, and the scores of those, float32."""
        mine = np.flatnonzero((items >= self.start) & (items < self.stop))
        size = _PAIRS if vectors.device.type == "cpu" else _PAIRS_ON_DEVICE
        places = np.zeros((2, -(-len(mine) // size) * size), dtype=np.int64)
        places[0, : len(mine)] = rows[mine]
        places[1, : len(mine)] = items[mine] - self.start
        row_parts, item_parts = (part.split(size) for part in torch.from_numpy(places).to(vectors.device))
        users = vectors.double()
        scores = [self._pairs(users, *part) for part in zip(row_parts, item_parts, strict=True) if len(part[0])]
        found = torch.cat(scores) if scores else vectors.new_empty(0, dtype=torch.float32)
        return mine, found[: len(mine)]

    def _pairs(self, users: Tensor, rows: Tensor, items: Tensor) -> Tensor:
        """Scores of pairs of a row of `users`, float64, and an item of this rank: float32."""
        products = users[rows] * self.vectors[items]  # float64, exact
        return products.sum(dim=1).float()

    def count_ahead(
        self,
        vectors: Tensor,
        target_rows: np.ndarray,
        target_scores: Tensor,
        hidden_rows: np.ndarray,
        hidden_items: np.ndarray,
    ) -> Tensor:
        """For each target, how many items of this rank score at least as high, (T,) int64.

        Args:
            vectors: (B, D).
            target_rows, target_scores: row of vectors and score of each target, (T,), the targets of a row
                together.
            hidden_rows, hidden_items: pairs that do not count.
        """
        if len(target_rows) == 0:
            return torch.zeros(0, dtype=torch.int64, device=vectors.device)
        device, size = vectors.device, len(vectors)
        lengths = np.bincount(target_rows, minlength=size)
        order = np.argsort(-lengths, kind="stable")  # rows with many targets first: target j compares a prefix of them
        place_of_row = np.argsort(order)
        column = np.arange(len(target_rows)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        cells = torch.from_numpy(np.stack([place_of_row[target_rows], column])).to(device)
        thresholds = torch.full((int(lengths.max()), size, 1), torch.inf, device=device)
        thresholds[cells[1], cells[0], 0] = target_scores
        prefix = [int(np.sum(lengths > j)) for j in range(len(thresholds))]
        counts = torch.zeros(thresholds.shape[:2], dtype=torch.int64, device=device)

        here = np.flatnonzero((hidden_items >= self.start) & (hidden_items < self.stop))
        here = here[np.argsort(hidden_items[here], kind="stable")]
        hidden = np.stack([place_of_row[hidden_rows[here]], hidden_items[here] - self.start])
        users = vectors[torch.from_numpy(order).to(device)]
        exact = users.double()
        for first in range(0, self.stop - self.start, self.chunk):
            block = self.vectors[first : first + self.chunk]
            if in_float64(device):
                scores = (exact @ block.double().T).float()  # (B, chunk)
            else:
                with matmul_precision("highest"):
                    scores = users @ block.T
            scores[:, self.stop - self.start - first :] = -torch.inf
            low, high = np.searchsorted(hidden[1], (first, first + self.chunk))
            rows, items = torch.from_numpy(hidden[:, low:high]).to(device)
            scores[rows, items - first] = -torch.inf
            for j, stop in enumerate(prefix):
                if in_float64(device):
                    counts[j, :stop] += _at_least(scores[:stop], thresholds[j, :stop])
                else:
                    counts[j, :stop] += self._recounted(exact[:stop], scores[:stop], first, thresholds[j, :stop])
        return counts[cells[1], cells[0]]

    def _recounted(self, users: Tensor, scores: Tensor, first: int, thresholds: Tensor) -> Tensor:
        """`_at_least` of the float64 scores, (B,) int64, from float32 scores of the items from `first` on.

        A float32 dot product in any order of addition is off by about D 2**-24 |u| |v| at most (Higham, Accuracy and
        Stability of Numerical Algorithms, section 3.1). Scores within twice that of the threshold are computed again.
        """
        norms = users.norm(dim=1, keepdim=True) * self.vectors[first : first + self.chunk].double().norm(dim=1).max()
        near = ((users.shape[1] + 8) * (2.0**-23 * norms + 2.0**-126)).float()
        counts = _at_least(scores, thresholds + near).long()
        rows, items = ((scores >= thresholds - near) & (scores < thresholds + near)).nonzero(as_tuple=True)
        for some_rows, some_items in zip(rows.split(_PAIRS_ON_DEVICE), items.split(_PAIRS_ON_DEVICE), strict=True):
            ahead = self._pairs(users, some_rows, some_items + first) >= thresholds[some_rows, 0]
            counts.index_add_(0, some_rows, ahead.long())
        return counts


def in_float64(device: torch.device) -> bool:
    """Whether to compute all scores in float64, which most GPUs do at a fraction of their speed."""
    return device.type == "cpu"


def _at_least(scores: Tensor, thresholds: Tensor) -> Tensor:
    """How many scores (B, items) reach the threshold of their row (B, 1): (B,) int32."""
    return (scores >= thresholds).view(torch.uint8).sum(dim=1, dtype=torch.int32)  # bytes add up faster than bools


def _nothing(heldout: Heldout) -> str:
    """Why there is no case to rank."""
    if seen := heldout.facts.get("heldout_seen", 0):
        return (
            f"nothing to rank: each of the {seen:,} held-out pairs is in train too, and items that a user has seen are "
            "masked; expected held-out pairs that are not in train"
        )
    return "nothing is held out: no user has an item to rank"


def user_metrics(
    scores: Tensor, ahead: Tensor, rows: Tensor, competitors: Tensor, ks: Sequence[int]
) -> dict[str, Tensor]:
    """All metrics of each user, (U,) float64, from the scores of the held-out items and the counts ahead of
    them.

    Args:
        scores, ahead, rows: (T,); see `ranking_metrics.positions_in_ranking`.
        competitors: number of competitors of each user, (U,).
    """
    positions, users = ranking_metrics.positions_in_ranking(scores, ahead, rows), len(competitors)
    values = {}
    for k in ks:
        values[f"HR@{k}"] = ranking_metrics.hit_rate(positions, rows, users, k)
        values[f"NDCG@{k}"] = ranking_metrics.ndcg(positions, rows, users, k)
        values[f"Recall@{k}"] = ranking_metrics.recall(positions, rows, users, k)
        values[f"UncappedRecall@{k}"] = ranking_metrics.uncapped_recall(positions, rows, users, k)
    values["MRR"] = ranking_metrics.reciprocal_rank(positions, rows, users)
    values["AUC"] = ranking_metrics.ranking_auc(ahead, rows, competitors)
    return values


def _values(lists: Jagged, start: int, stop: int) -> np.ndarray:
    return lists.values[lists.offsets[start] : lists.offsets[stop]]
