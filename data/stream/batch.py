"""Batches for TorchRec models: positives and their negatives as KeyedJaggedTensors, for a train pipeline."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from torchrec.streamable import Pipelineable

from recpress.data.dataset.side_table import JaggedColumn, SideTable
from recpress.data.errors import InputError
from recpress.data.negatives.samplers import InBatchNegatives, Negatives
from recpress.data.stream.keyed_features import KeyedFeatures
from recpress.data.stream.loader import Interactions

USER, ITEM = "user", "item"
"""Keys of the ids in the KeyedJaggedTensors."""


@dataclass
class Batch(Pipelineable):
    """B rows, each with its positive item and N negatives, drawn per row or shared by all rows.

    Items lie as B positives, then the negatives: those of row 0, of row 1, …, or the N shared ones. So `x[:B]` are
    the positives, and `x[B:].view(B, N, …)` or `x[B:]` the negatives.
    """

    user_features: KeyedJaggedTensor
    """Keys "user" and the users' categorical features, stride B."""
    item_features: KeyedJaggedTensor
    """Keys "item" and the items' categorical features, stride B * (1 + N)."""
    label: torch.Tensor
    """Of the positives; ones if the log has none. (B,) float32"""
    log_q: torch.Tensor
    """Log of the probability with which each item comes up: of a negative, in one draw; of a positive, as the
    item of a row where the counts of the items are known, else in one draw. (B * (1 + N),) float32"""
    excluded: torch.Tensor | None = None
    """Of shared negatives: which are positives of which row's user, and so no negatives of it. (B, N) bool"""
    user_floats: torch.Tensor | None = None  # (B, F)
    item_floats: torch.Tensor | None = None  # (B * (1 + N), F)

    @property
    def labels(self) -> torch.Tensor:
        """`label`, under the name that TorchRec's batches have."""
        return self.label

    def to(self, device: torch.device, non_blocking: bool = False) -> Batch:
        return Batch(
            self.user_features.to(device, non_blocking),
            self.item_features.to(device, non_blocking),
            self.label.to(device, non_blocking=non_blocking),
            self.log_q.to(device, non_blocking=non_blocking),
            _maybe(self.excluded, lambda mask: mask.to(device, non_blocking=non_blocking)),
            _maybe(self.user_floats, lambda floats: floats.to(device, non_blocking=non_blocking)),
            _maybe(self.item_floats, lambda floats: floats.to(device, non_blocking=non_blocking)),
        )

    def pin_memory(self) -> Batch:
        return Batch(
            self.user_features.pin_memory(),
            self.item_features.pin_memory(),
            self.label.pin_memory(),
            self.log_q.pin_memory(),
            _maybe(self.excluded, torch.Tensor.pin_memory),
            _maybe(self.user_floats, torch.Tensor.pin_memory),
            _maybe(self.item_floats, torch.Tensor.pin_memory),
        )

    def record_stream(self, stream: torch.Stream) -> None:
        for part in (self.user_features, self.item_features, self.label, self.log_q):
            part.record_stream(stream)
        for part in (self.excluded, self.user_floats, self.item_floats):
            if part is not None:
                part.record_stream(stream)


class BatchBuilder:
    """Makes batches of the rows of a stream: `map(BatchBuilder(negatives), stream)`.

    Features of users and items come from side tables, by id, so that negatives have them too. Categorical and
    float columns of the log itself are what is known of the occasion, and join the user's features; a missing
    float becomes 0.

    Args:
        negatives: which negatives; `count` of each row, or of the batch.
        history: name of the feature of users that lists their items. The item of a row does not count in its list.
        shared: whether all rows of a batch have the same.
        item_counts: occurrences of each item, for the `log_q` of positives.
        device: where batches are made. Ids move there first, negatives and features are made there.
        pin_memory: page-locked results, from which CUDA copies during the computation.
    """

    def __init__(
        self,
        negatives: Negatives,
        *,
        shared: bool = False,
        item_counts: np.ndarray | torch.Tensor | None = None,
        user_table: SideTable | None = None,
        item_table: SideTable | None = None,
        device: torch.device | str = "cpu",
        pin_memory: bool = False,
        history: str | None = None,
    ) -> None:
        self._history = history
        self.negatives, self.device, self._shared, self._pin = negatives, torch.device(device), shared, pin_memory
        tables = (user_table, item_table)
        self._on_host: BatchBuilder | None = None
        if self.device.type != "cpu" and any(table is not None and table.has_lists for table in tables):
            self._on_host = BatchBuilder(
                negatives,
                shared=shared,
                item_counts=item_counts,
                user_table=user_table,
                item_table=item_table,
                pin_memory=True,
                history=history,
            )
        self._popularity = None if item_counts is None else InBatchNegatives(item_counts)
        self._user_table = None if user_table is None else user_table.to(self.device)
        self._item_table = None if item_table is None else item_table.to(self.device)
        self._keyed = KeyedFeatures(self.device)

    def replace_users(self, table: SideTable | None) -> None:
        """Take other features of users, with the same names."""
        self._user_table = None if table is None else table.to(self.device)
        if self._on_host is not None:
            self._on_host.replace_users(table)

    def for_training(self) -> BatchBuilder:
        """This builder, or on CUDA with lists of ids one that builds on the host.

        On the device, the host would wait in each step for the number of values of the lists.
        """
        return self._on_host or self

    def __call__(self, rows: Interactions) -> Batch:
        batch = self._build(rows)
        return batch.pin_memory() if self._pin else batch

    def _build(self, rows: Interactions) -> Batch:
        assert rows.user is not None
        assert rows.item is not None
        users, positives = self._move(rows.user), self._move(rows.item)
        excluded = None
        if self._shared:
            negatives, excluded = self.negatives.draw_shared(users, rows.epoch, rows.position)  # (N,), (B, N)
        else:
            negatives = self.negatives.draw(users, rows.epoch, rows.position).flatten()  # (B * N,)
        label = torch.ones(rows.size, device=self.device) if rows.label is None else self._move(rows.label)
        of_positives = (self._popularity or self.negatives).log_q(positives)
        user_features, user_floats = self.users(users, rows)
        item_features, item_floats = self.items(torch.cat([positives, negatives]))
        return Batch(
            user_features,
            item_features,
            label,
            torch.cat([of_positives, self.negatives.log_q(negatives)]),
            excluded,
            user_floats,
            item_floats,
        )

    def users(
        self, ids: torch.Tensor, rows: Interactions | None = None
    ) -> tuple[KeyedJaggedTensor, torch.Tensor | None]:
        """Features of users as a model takes them; `rows` bring the columns of the log."""
        features, floats = self._lookup(USER, self._move(ids), self._user_table)
        if rows is None:
            return self._keyed(features, len(ids)), floats
        if self._history is not None and rows.item is not None:
            features[self._history] = _without(features[self._history], self._move(rows.item))
        for name, column in rows.categorical.items():
            if name in features:
                raise InputError(f"column '{name}' of the log is also a feature of the users; rename one")
            if isinstance(column, JaggedColumn):
                features[name] = JaggedColumn(self._move(column.values), self._move(column.lengths))
            else:
                features[name] = self._move(column)
        if rows.floats is not None:
            found = self._move(rows.floats)
            found = found.masked_fill(found.isnan(), 0.0)
            floats = found if floats is None else torch.cat([floats, found], dim=1)
        return self._keyed(features, len(ids)), floats

    def items(self, ids: torch.Tensor) -> tuple[KeyedJaggedTensor, torch.Tensor | None]:
        """Features of items as a model takes them."""
        features, floats = self._lookup(ITEM, self._move(ids), self._item_table)
        return self._keyed(features, len(ids)), floats

    def _lookup(
        self, key: str, ids: torch.Tensor, table: SideTable | None
    ) -> tuple[dict[str, torch.Tensor | JaggedColumn], torch.Tensor | None]:
        features: dict[str, torch.Tensor | JaggedColumn] = {key: ids}
        if table is None:
            return features, None
        found, floats = table.gather(ids)
        if key in found:
            raise InputError(f"a feature of the {key}s is called '{key}', which is the key of their id; rename it")
        return features | found, floats

    def _move(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self.device, non_blocking=True)


def _without(lists: torch.Tensor | JaggedColumn, items: torch.Tensor) -> JaggedColumn:
    """Lists of items without one item each, (B,)."""
    assert isinstance(lists, JaggedColumn)
    row = torch.repeat_interleave(lists.lengths)
    kept = lists.values != items[row]
    return JaggedColumn(lists.values[kept], torch.bincount(row[kept], minlength=len(items)))


def _maybe(tensor, move):  # type: ignore[no-untyped-def]
    return None if tensor is None else move(tensor)
