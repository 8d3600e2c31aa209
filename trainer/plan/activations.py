"""Memory of the tensors of a step, by running it on the device "meta"."""

from __future__ import annotations

import weakref
from typing import Any, Literal, cast

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from recpress.modules.two_tower.towers import TowerInput
from recpress.trainer.plan.job import Job
from recpress.trainer.plan.shards import MetaTowers


class _Peak(TorchDispatchMode):
    """Follows the bytes of the tensors that live; on the device "meta" nothing is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(found):
            if isinstance(leaf, torch.Tensor):
                self._add(leaf.untyped_storage())
        return found

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._known:
            return
        self._known.add(key)
        self.now += storage.nbytes()
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._drop, key, storage.nbytes())

    def _drop(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def activation_bytes(job: Job, model: MetaTowers) -> int:
    """Most bytes of tensors in forward and backward of towers and loss, run on tensors without memory."""
    batch, items = job.strides
    training = job.network.model.tables.strategy != "frozen"
    negatives = job.network.negatives

    def given(tower: TowerInput, size: int) -> tuple[dict, dict, Any, Any]:
        results: dict[str, dict[str, torch.Tensor]] = {"frozen": {}, "tables": {}}
        for (where, key), width in [(tower.base, tower.dim), *tower.others]:
            wants = where == "tables" and training
            results[where][key] = torch.empty(size, width, device="meta", requires_grad=wants)
        count = torch.empty(size, 1, device="meta") if tower.count == "given" else None
        if tower.count not in (None, "given"):
            where, key = cast(tuple[Literal["frozen", "tables"], str], tower.count)
            results[where][key] = torch.empty(size, 4, device="meta")
        floats = torch.empty(size, tower.floats, device="meta") if tower.floats else None
        return results["frozen"], results["tables"], floats, count

    inputs = given(model.user_tower.given, batch), given(model.item_tower.given, items)
    label, log_q = torch.empty(batch, device="meta"), torch.empty(items, device="meta")
    ids = torch.empty(items, dtype=torch.int64, device="meta")
    mask = torch.empty(batch, negatives.count, dtype=torch.bool, device="meta") if negatives.shared else None
    with _Peak() as tracked:
        users, _ = cast(Any, model.user_tower)(*inputs[0])
        vectors, _ = cast(Any, model.item_tower)(*inputs[1])
        loss = model.loss(users, vectors, label, log_q, ids, mask)
        loss.backward()
    for parameter in model.parameters():
        parameter.grad = None
    return tracked.most
