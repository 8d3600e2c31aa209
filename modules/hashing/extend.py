"""Rows for ids that arrive after the map was made."""

from __future__ import annotations

import torch

from recpress.modules.hashing.clustering import nearest
from recpress.modules.hashing.id_map import IdMap
from recpress.modules.hashing.shared_rows import add_members
from recpress.modules.rows import RowSource, blocks

FORMULA = ("modulo", "universal", "double")
"""Computed methods whose formula does not change with the number of ids."""


def row_centres(id_map: IdMap, embedding: RowSource, weights: torch.Tensor | None = None) -> torch.Tensor:
    """Weighted mean of the vectors of each row's ids, which is what the row stands for: (num_rows, d) float32.

    A row whose ids weigh nothing has NaN, and no id that arrives is nearest to it.

    Args:
        embedding: (num_ids, d), read in blocks.
        weights: (num_ids,) >= 0, say the counts; None for ones.

    Raises:
        ValueError: ids have more than one row; sizes that do not fit; a vector that is not finite.
    """
    if id_map.ways != 1:
        raise ValueError(f"id map {id_map.method!r}: ids have {id_map.ways} rows, and rows no centres")
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
    centres: torch.Tensor | None = None,
    embedding: RowSource | None = None,
    vocabulary: str | None = None,
) -> IdMap:
    """`old` with the ids old.num_ids to num_ids - 1 as well; those that it covers keep their rows.

    An id that arrives gets the row of the nearest centre by Euclidean distance. One of which nothing is known, because
    there is no embedding or its vector is zero, gets its hashed row (`IdMap.hashed`); under `modulo`, id mod rows.

    Args:
        centres: (num_rows, d), of `row_centres`; a row of NaN takes no id.
        embedding: (num_ids - old.num_ids, d) of the ids that arrive, in the space of `centres`.
        vocabulary: fingerprint of all ids together.

    Raises:
        ValueError: fewer ids than before; sizes that do not fit; one of centres and embedding without the other; an
            embedding for a map whose ids have more than one row; a vector that is not finite.
    """
    arriving = num_ids - old.num_ids
    if arriving < 0:
        raise ValueError(f"id map: covers {old.num_ids} ids, expected at least as many afterwards, not {num_ids}")
    if (centres is None) != (embedding is None):
        raise ValueError("id map: centres and the embedding of the ids that arrive go together; one is missing")
    ids = torch.arange(old.num_ids, num_ids)
    hashed = ids.remainder(old.num_rows).int()[:, None] if old.method == "modulo" else old.hashed(ids)
    rows = torch.cat([old.rows, hashed])
    if centres is not None and embedding is not None:
        _check(old, arriving, centres, embedding)
        known = torch.isfinite(centres).all(1).nonzero()[:, 0]
        for first, block in blocks(embedding, old.method, (0, arriving), (0, centres.shape[1])):
            ids = block.any(1).nonzero()[:, 0]
            rows[old.num_ids + first + ids, 0] = known[nearest(block[ids], centres[known])].int()
    weights = None if old.weights is None else torch.cat([old.weights, torch.ones(arriving, old.ways)])
    return IdMap(
        rows=rows,
        num_rows=old.num_rows,
        weights=weights,
        method=old.method,
        vocabulary=vocabulary,
        computed=old.computed and old.method in FORMULA and embedding is None,
        seed=old.seed,
    )


def _check(old: IdMap, arriving: int, centres: torch.Tensor, embedding: RowSource) -> None:
    if old.ways != 1:
        raise ValueError(f"id map {old.method!r}: ids have {old.ways} rows, so that none is nearest; give no embedding")
    if len(centres.shape) != 2 or centres.shape[0] != old.num_rows:
        raise ValueError(f"id map: centres have shape {tuple(centres.shape)}, expected {old.num_rows} rows")
    if tuple(embedding.shape) != (arriving, centres.shape[1]):
        raise ValueError(
            f"id map: the embedding of the ids that arrive has shape {tuple(embedding.shape)}, "
            f"expected {(arriving, centres.shape[1])}"
        )
    if not bool(torch.isfinite(centres).all(1).any()):
        raise ValueError("id map: no row has a centre")
