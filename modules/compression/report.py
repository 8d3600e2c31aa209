"""What `compress` did to the tables of a model, and the rows to load after sharding."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torchrec.distributed.model_parallel import DistributedModelParallel

from recpress.modules.compression.bake import bake
from recpress.modules.compression.collections import Compressed
from recpress.modules.fingerprints import is_fingerprint
from recpress.modules.row_source import RowSource

_WRAPPERS = ("_dmp_wrapped_module", "module")


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

        Skips tables without rows, whose weights were on the device "meta" in `compress`. Needed only if the sharders
        of DistributedModelParallel are not `recpress.modules.sharders()`.

        Raises:
            ValueError: the model has no compressed collection; shapes or values do not fit.
        """
        for _, module in _compressed(model):
            for table in module.tables():
                if table in self.rows:
                    module.load(table, self.rows[table])

    def state_dict(self, model: nn.Module) -> dict[str, Any]:
        """`model.state_dict()` with the frozen tables as float32 under their original names, and without fingerprints.

        The names are those of the model before `compress`: `<path>.embedding_bags.<table>.weight`. A table with a map
        has its shared rows (num_rows, dim). Frozen tables of a sharded model are ShardedTensors of decoded rows, for
        torch.distributed.checkpoint; each rank needs memory for its decoded shards. Collective if sharded.

        Raises:
            ValueError: the model has no compressed collection; frozen rows were never loaded.
        """
        found = {key: value for key, value in model.state_dict().items() if not is_fingerprint(key)}
        for path, module in _compressed(model):
            if module.frozen is None:
                continue
            dims = {c.name: c.embedding_dim for c in module._configs}
            for table in module.frozen.tables():
                module.frozen.check_loaded()
                key = ".".join(part for part in (path, module._group, table.name, "weight") if part)
                found[key] = module.frozen.whole(table.name, dims[table.name])
        return found

    def bake(self, model: nn.Module) -> nn.Module:
        """A copy of `model` that needs neither this report nor files: plain TorchRec collections with all rows.

        For other tools: quantization, export, serving. Frozen rows are float32 parameters that need no gradient, and
        `state_dict` is complete. A collection without maps is again an EmbeddingBagCollection or EmbeddingCollection;
        one with maps is a module of two parts: `maps`, with the maps as buffers, and `tables`, the plain collection.

        Needs memory for a second model, with frozen rows in 32 bits.

        Raises:
            ValueError: the model has no compressed collection, or is sharded; rows were never loaded.

        Example:
            >>> from torchrec import EmbeddingBagCollection, EmbeddingBagConfig
            >>> from recpress.modules import compress
            >>> table = EmbeddingBagConfig(name="t", num_embeddings=6, embedding_dim=4, feature_names=["f"])
            >>> model, report = compress(EmbeddingBagCollection([table]), {}, {"t": torch.ones(6, 4)}, storage="int8")
            >>> report.bake(model).state_dict()["embedding_bags.t.weight"].shape
            torch.Size([6, 4])
        """
        return bake(model, _compressed(model))

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


def _compressed(model: nn.Module) -> list[tuple[str, Any]]:
    """(path as in `state_dict`, collection) of each compressed collection."""
    found: list[tuple[str, Any]] = [(p, m) for p, m in model.named_modules() if isinstance(m, Compressed)]
    if not found:
        raise ValueError("compress: the model has no compressed collection")
    return [(".".join(_unwrapped(model, path)), module) for path, module in found]


def _unwrapped(model: nn.Module, path: str) -> list[str]:
    """The parts of a path without those that DistributedModelParallel and DistributedDataParallel add."""
    parts, module = [], model
    for name in path.split(".") if path else []:
        wrapped = isinstance(module, DistributedModelParallel | DistributedDataParallel) and name in _WRAPPERS
        if not wrapped:
            parts.append(name)
        module = module.get_submodule(name)
    return parts
