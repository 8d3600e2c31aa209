"""Frozen embedding tables: a collection of their own, sharded by TorchRec, with nothing of training in it.

`requires_grad_(False)` is ignored by TorchRec's fused tables, and a learning rate of 0 still pays for the
backward pass and the optimizer state. Here the lookup and the exchange of its results run without autograd,
there is no optimizer, and rows can be stored in 32, 16, 8 or 4 bits. Rows are not part of the module's
`state_dict`, only a fingerprint of each table: rows come from factors (`load`) and do not change.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torchrec import KeyedJaggedTensor, KeyedTensor

from recpress.modules.frozen.kernel import FrozenKernel, HasKernels, Shard
from recpress.modules.frozen.tables import QUANTIZED, FrozenTable, Storage, row_bytes

__all__ = ["QUANTIZED", "FrozenEmbeddingBagCollection", "FrozenTable", "Storage", "row_bytes"]


class FrozenEmbeddingBagCollection(HasKernels):
    """Frozen tables with sum pooling: KeyedJaggedTensor -> KeyedTensor, never with a gradient.

    Used as it is, or sharded by DistributedModelParallel with `FrozenEmbeddingBagCollectionSharder` (`frozen_sharded`)
    in its sharders. On the device "meta" it holds no rows and serves only to be sharded.

    Args:
        weighted: a row counts as often as its per-sample weight says, which the features must bring; otherwise weights
            are ignored, as TorchRec does.

    Raises:
        ValueError: no table, a name twice, a dimension that is not a multiple of 4; in forward, a table that was never
            loaded, a feature that the batch lacks, an id that its table does not have; on loading a checkpoint, one
            that was saved with other rows.
    """

    def __init__(
        self, tables: Iterable[FrozenTable], device: torch.device | str = "cpu", *, weighted: bool = False
    ) -> None:
        super().__init__()
        self._tables, self.weighted = list(tables), weighted
        self.device = torch.device(device)
        if not self._tables:
            raise ValueError("frozen tables: none are given, expected at least one")
        for table in self._tables:
            if table.dim % 4:
                raise ValueError(f"table {table.name!r}: dimension {table.dim} is not a multiple of 4")
        self._plain: list[FrozenKernel] = []  # not a ModuleList: the rows stay out of state_dict and DDP
        if self.device.type != "meta":
            for t in self._tables:
                shard = Shard(t.name, (0, t.rows), (0, t.dim), len(t.features))
                self._plain.append(FrozenKernel([shard], t.storage, self.device, weighted=weighted))
        features = [feature for table in self._tables for feature in table.features]
        self._names = [
            f"{feature}@{table.name}" if features.count(feature) > 1 else feature
            for table in self._tables
            for feature in table.features
        ]
        self._dims = [table.dim for table in self._tables for _ in table.features]
        self.init_checks()

    def tables(self) -> list[FrozenTable]:
        return self._tables

    def kernels(self) -> Iterator[FrozenKernel]:
        yield from self._plain

    def forward(self, features: KeyedJaggedTensor) -> KeyedTensor:
        """Keys of the result: `feature`, or `feature@table` where several tables share it, as in TorchRec."""
        if not self._plain:
            raise ValueError(
                f"frozen table {self._tables[0].name!r}: on the device 'meta' its collection can only be sharded; pass "
                "`FrozenEmbeddingBagCollectionSharder()` in the sharders of DistributedModelParallel"
            )
        if not torch.compiler.is_exporting():
            self.check_batch(features)
        keys = features.keys()
        values = [
            kernel(features.permute([keys.index(feature) for feature in table.features]))
            for table, kernel in zip(self._tables, self._plain, strict=True)
        ]
        return KeyedTensor(self._names, self._dims, torch.cat(values, 1) if len(values) > 1 else values[0])
