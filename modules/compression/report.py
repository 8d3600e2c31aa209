"""What `compress` did to the tables of a model, and the rows that go into them once it is sharded."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn

from recpress.modules.compression.collections import CompressedEmbeddingBagCollection, CompressedEmbeddingCollection
from recpress.modules.row_source import RowSource


@dataclass(frozen=True, kw_only=True)
class TableReport:
    """What became of one table; bytes are those of its rows, without optimizer state."""

    table: str
    kind: str
    """`shared`, `frozen` or `frozen, shared`."""
    rows_before: int
    rows_after: int
    bytes_before: int
    bytes_after: int
    map_bytes: int
    """Of the map as each rank holds it; 0 where another table of this report has the same map."""


@dataclass(frozen=True, eq=False, kw_only=True)
class CompressReport:
    """What `compress` did; `str(report)` is a table. Holds the new rows until it is dropped."""

    tables: list[TableReport]
    rows: dict[str, RowSource] = field(repr=False)
    """Every table of the collections that were replaced -> its rows, as they are now."""

    def load(self, model: nn.Module) -> None:
        """Fill the tables of `model`, which was sharded after `compress`: each rank its own shards.

        DistributedModelParallel makes new rows for every table; without this call the frozen ones have none.

        Raises:
            ValueError: the model has none of the compressed collections, or a table has no rows to load (its weights
                were on the device "meta" when the model was compressed).
        """
        found = [
            m
            for m in model.modules()
            if isinstance(m, CompressedEmbeddingBagCollection | CompressedEmbeddingCollection)
        ]
        if not found:
            raise ValueError("compress: the model to load has no compressed collection")
        for module in found:
            for table in module.tables():
                if table not in self.rows:
                    raise ValueError(f"table {table!r}: it had no rows to load when the model was compressed")
                module.load(table, self.rows[table])

    def __str__(self) -> str:
        head = ("table", "what", "rows", "", "bytes", "", "map bytes")
        body = [
            (t.table, t.kind, f"{t.rows_before:,}", f"{t.rows_after:,}", f"{t.bytes_before:,}", f"{t.bytes_after:,}",
             f"{t.map_bytes:,}")
            for t in self.tables
        ]  # fmt: skip
        sums = [sum(getattr(t, name) for t in self.tables) for name in
                ("rows_before", "rows_after", "bytes_before", "bytes_after", "map_bytes")]  # fmt: skip
        lines = [head, *body, ("all", "", *(f"{s:,}" for s in sums))]
        widths = [max(len(line[c]) for line in lines) for c in range(len(head))]
        text = []
        for line in lines:
            names = [line[c].ljust(widths[c]) for c in (0, 1)]
            numbers = [line[c].rjust(widths[c]) for c in range(2, len(head))]
            text.append("  ".join(names + numbers).rstrip())
        kept = (sums[3] + sums[4]) / max(1, sums[2])
        return "\n".join([*text, f"bytes kept, maps included: {100 * kept:.1f} %"])
