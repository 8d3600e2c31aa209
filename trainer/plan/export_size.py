"""Size of what `recpress export` writes of a model."""

from __future__ import annotations

from typing import cast

from recpress.modules.frozen.kernel import Storage, row_bytes
from recpress.modules.serving.rows import narrower
from recpress.trainer.plan.job import Job, SideShape
from recpress.trainer.plan.meta_model import MetaTowers


def export_bytes(job: Job, model: MetaTowers, storage: Storage = "int8") -> int:
    """Bytes of the tensors of both programs: rows of tables, bit-packed maps, log counts, side features and towers.

    Lists of a side table are counted as one value per id. Each table has one more row, for unknown ids.
    """
    total = sum(4 * parameter.numel() for parameter in model.dense())
    for table in model.table_shards():
        if table.table == f"{table.side}_count":
            total += 4 * (table.rows + 1)
        else:
            stored = cast(Storage, table.storage or "fp32")
            total += row_bytes(narrower(stored, storage), table.width) * (table.rows + 1)
    return total + sum(_per_id(side, model.counted) for side in (job.user, job.item))


def _per_id(side: SideShape, counted: bool) -> int:
    """Bytes of what a program stores of each id, besides tables."""
    found = 4 * (side.ids + 1) * (len(side.categorical) + side.floats)
    if side.map is None:
        return found
    bits = max(1, (side.map.num_rows - 1).bit_length())
    entries = side.ids * side.map.rows_per_id
    return found + entries * bits // 8 + entries * side.map.weight_bytes + side.ids * counted
