"""Extend a map to new ids. Known ids do not move."""

from __future__ import annotations

import torch

from recpress.modules.hashing.id_map import IdMap
from recpress.modules.hashing.k_means import nearest
from recpress.modules.hashing.shared_rows import add_members
from recpress.modules.row_source import RowSource, blocks

FORMULA = ("modulo", "universal", "double")
"""Computed methods whose formula does not depend on the number of ids."""


def row_centers(id_map: IdMap, embedding: RowSource, weights: torch.Tensor | None = None) -> torch.Tensor:
    """Weighted mean of the vectors of each row's ids: (num_rows, d) float32.

    A row whose ids have no weight is NaN. New ids never join it.

    Args:
        embedding: (num_ids, d), read in blocks.
        weights: (num_ids,) >= 0, for example the counts; None for ones.

    Raises:
        ValueError: ids have more than one row; sizes do not fit; a vector is not finite.
    """
    if id_map.rows_per_id != 1:
        raise ValueError(
            f"id map {id_map.method!r}: {id_map.rows_per_id} rows per id, expected one: such rows have no centers"
        )
    if embedding.shape[0] != id_map.num_ids:
        raise ValueError(f"id map: covers {id_map.num_ids} ids, the embedding has {embedding.shape[0]} rows")
    if weights is not None and weights.shape != (id_map.num_ids,):
        raise ValueError(f"id map: weights have shape {tuple(weights.shape)}, expected ({id_map.num_ids},)")
    sums, mass = torch.zeros(id_map.num_rows, embedding.shape[1]), torch.zeros(id_map.num_rows, 1)
    for first, block in blocks(embedding, id_map.method, (0, id_map.num_ids), (0, embedding.shape[1])):
        weight = torch.ones(len(block)) if weights is None else weights[first : first + len(block)].float()
        add_members(sums, mass, id_map, first, block, weight[:, None])
    return sums / mass


def extend_map(
    old: IdMap,
    num_ids: int,
    *,
    centers: torch.Tensor | None = None,
    embedding: RowSource | None = None,
    vocabulary: str | None = None,
) -> IdMap:
    """Add the ids old.num_ids to num_ids - 1 to a map. Other ids keep their rows.

    A new id gets the row with the nearest center (Euclidean distance). Without an embedding, or with a zero vector, it
    gets its hashed row (`IdMap.hashed`), or id mod rows if the method is `modulo`.

    Args:
        centers: (num_rows, d), from `row_centers`. A row of NaN gets no ids.
        embedding: (num_ids - old.num_ids, d) vectors of the new ids, in the space of `centers`.
        vocabulary: fingerprint of all ids.

    Raises:
        ValueError: there are fewer ids than before; sizes do not fit; centers or embedding is missing while the other
            is given; an embedding for a map with more than one row per id; a vector is not finite.
    """
    num_new = num_ids - old.num_ids
    if num_new < 0:
        raise ValueError(f"id map: covers {old.num_ids} ids, expected at least as many afterwards, not {num_ids}")
    if (centers is None) != (embedding is None):
        raise ValueError("id map: expected centers and the embedding of the new ids together; one is missing")
    ids = torch.arange(old.num_ids, num_ids)
    hashed = ids.remainder(old.num_rows).int()[:, None] if old.method == "modulo" else old.hashed(ids)
    rows = torch.cat([old.rows, hashed])
    if centers is not None and embedding is not None:
        _check(old, num_new, centers, embedding)
        known = torch.isfinite(centers).all(1).nonzero()[:, 0]
        for first, block in blocks(embedding, old.method, (0, num_new), (0, centers.shape[1])):
            ids = block.any(1).nonzero()[:, 0]
            rows[old.num_ids + first + ids, 0] = known[nearest(block[ids], centers[known])].int()
    weights = None if old.weights is None else torch.cat([old.weights, torch.ones(num_new, old.rows_per_id)])
    return IdMap(
        rows=rows,
        num_rows=old.num_rows,
        weights=weights,
        method=old.method,
        vocabulary=vocabulary,
        computed=old.computed and old.method in FORMULA and embedding is None,
        seed=old.seed,
    )


def _check(old: IdMap, num_new: int, centers: torch.Tensor, embedding: RowSource) -> None:
    if old.rows_per_id != 1:
        raise ValueError(
            f"id map {old.method!r}: {old.rows_per_id} rows per id, expected one with an embedding; pass none"
        )
    if len(centers.shape) != 2 or centers.shape[0] != old.num_rows:
        raise ValueError(f"id map: centers have shape {tuple(centers.shape)}, expected {old.num_rows} rows")
    if tuple(embedding.shape) != (num_new, centers.shape[1]):
        raise ValueError(
            f"id map: the embedding of the new ids has shape {tuple(embedding.shape)}, "
            f"expected {(num_new, centers.shape[1])}"
        )
    if not bool(torch.isfinite(centers).all(1).any()):
        raise ValueError("id map: no row has a center")
