"""What `compress` did to the tables of a model, and the rows to load after sharding."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn

from recpress.modules.compression.collections import CompressedEmbeddingBagCollection, CompressedEmbeddingCollection
from recpress.modules.row_source import RowSource


@dataclass(frozen=True, kw_only=True)
class TableChange:
    """One table before and after. Bytes are those of its rows, without optimizer state."""

    table: str
    kind: str
    """`shared`, `frozen` or `frozen, shared`."""
    rows_before: int
    rows_after: int
    bytes_before: int
    bytes_after: int
    map_bytes: int
    """Bytes of the map on each rank; 0 if an earlier table of the report has the same map."""


@dataclass(frozen=True, eq=False, kw_only=True)
class CompressReport:
    """What `compress` did. `str(report)` is a table. Holds the new rows until it is deleted."""

    tables: list[TableChange]
    rows: dict[str, RowSource] = field(repr=False)
    """Name of each table in the replaced collections -> its rows."""

    def load(self, model: nn.Module) -> None:
        """Load the tables of `model`, which was sharded after `compress`. Each rank loads its own shards.

        DistributedModelParallel creates new rows for every table. Without this call, frozen tables have no rows.

        Raises:
            ValueError: the model has no compressed collection; a table has no rows to load, because its weights were on
                the device "meta" in `compress`.
        """
        found = [
            m
            for m in model.modules()
            if isinstance(m, CompressedEmbeddingBagCollection | CompressedEmbeddingCollection)
        ]
        if not found:
            raise ValueError("compress: the model has no compressed collection to load")
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
