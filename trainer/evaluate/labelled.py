"""Predictions of a sharded model on held-out rows with labels: the `val` and `test` parts, or rows of the sample."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from torch import nn
from torchrec.datasets.utils import Batch

from recpress.data.config import SampleConfig
from recpress.data.dataset.columns import Jagged
from recpress.data.dataset.parquet_split import ParquetSplit, iter_row_groups
from recpress.data.dataset.side_table import JaggedColumn
from recpress.data.sampling.scan import iter_columns
from recpress.data.sampling.selection import Selection
from recpress.trainer.distributed.collectives import all_gather
from recpress.trainer.distributed.process_group import Ranks
from recpress.trainer.evaluate.binary import BinaryMetrics
from recpress.trainer.features.batches import FeatureBatches

Chunk = dict[str, np.ndarray | Jagged]
"""Columns of some rows."""


def held_out_rows(selection: Selection, rows: ParquetSplit, columns: Sequence[str], ranks: Ranks) -> list[Chunk]:
    """The rows that the selection holds out, in the row groups of this rank."""
    places = selection.candidates[ranks.rank :: ranks.world_size].tolist()
    found = []
    for place, data in iter_row_groups(rows, columns, places):
        held = selection.held_out(place)
        found.append({name: column.take(held) for name, column in data.items()})
    return found


def part_rows(
    rows: ParquetSplit, columns: Sequence[str], ranks: Ranks, most: int = 0, seed: int = 0
) -> Iterator[Chunk]:
    """Rows of a part, in the row groups of this rank: all, or a random sample of about `most` rows."""
    sample = SampleConfig(rate=most / rows.num_rows, seed=seed) if 0 < most < rows.num_rows else None
    return iter_columns(rows, columns, rank=ranks.rank, world=ranks.world_size, sample=sample)


def evaluate_rows(
    model: nn.Module, chunks: Iterable[Chunk], builder: FeatureBatches, ranks: Ranks, batch_size: int
) -> dict[str, float]:
    """AUC, NE, LogLoss and Calibration of the model, in eval mode, on the rows of all ranks. Collective.

    All ranks call the model equally often with `batch_size` rows, because its lookups are collective. Filler rows do
    not count.

    Args:
        model: batch -> (loss, probabilities (B,)).
    """
    metrics = BinaryMetrics()
    batches = _batches(chunks, builder, batch_size)
    filler = builder.filler(batch_size)
    while True:
        batch, count = next(batches, (filler, 0))
        if not any(int(rows) for rows in all_gather(torch.tensor([count]))):
            return metrics.compute()
        with torch.no_grad():
            _, probability = model(batch.to(ranks.device))
        if count:
            metrics.add(probability[:count], batch.labels[:count])


def _batches(chunks: Iterable[Chunk], builder: FeatureBatches, size: int) -> Iterator[tuple[Batch, int]]:
    """(batch of `size` rows, how many of them count)."""
    for chunk in chunks:
        total = len(chunk[builder.label])
        for first in range(0, total, size):
            count = min(size, total - first)
            columns = {name: _padded(column, first, count, size) for name, column in chunk.items()}
            label = columns[builder.label]
            assert isinstance(label, torch.Tensor)
            yield builder.make(columns, label), count


def _padded(column: np.ndarray | Jagged, first: int, count: int, size: int) -> torch.Tensor | JaggedColumn:
    """Rows [first, first + count), and zeros or empty lists up to `size` rows."""
    if isinstance(column, Jagged):
        part = column.slice(first, first + count)
        lengths = np.pad(part.lengths, (0, size - count))
        return JaggedColumn(torch.from_numpy(part.values), torch.from_numpy(lengths))
    return torch.from_numpy(np.pad(column[first : first + count], (0, size - count)))
