"""Finds frozen tables that DistributedModelParallel has not sharded, at its call or in the first forward."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from recpress.modules.frozen.kernel import FrozenTable


def inside(kind: str, module: str) -> bool:
    """Whether a method of an instance of the class `module.kind` is on the stack. Costs some microseconds."""
    loaded = sys.modules.get(module)
    wanted = getattr(loaded, kind, None)
    if wanted is None:
        return False
    frame = sys._getframe(1)
    while frame is not None:
        if isinstance(frame.f_locals.get("self"), wanted):
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


class Unsharded(nn.Module):
    """Base of the plain collections. Without their sharder, each rank would silently hold all rows."""

    _checked = False

    def tables(self) -> list[FrozenTable]:
        raise NotImplementedError

    @torch.compiler.disable
    def check_sharding(self) -> None:
        """Raise ValueError if this collection is in a DistributedModelParallel, or on the device "meta"."""
        if self._checked:
            return
        name = self.tables()[0].name
        if self._device.type == "meta":
            raise ValueError(
                f"frozen table {name!r}: a collection on the device 'meta' can only be sharded; pass "
                "`sharders=recpress.modules.sharders()` to DistributedModelParallel, and to its planner"
            )
        if inside("DistributedModelParallel", "torchrec.distributed.model_parallel"):
            raise ValueError(
                f"frozen table {name!r}: DistributedModelParallel has not sharded it, so each rank would hold all "
                "rows; pass `sharders=recpress.modules.sharders()` to it, and to its planner"
            )
        self._checked = True

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Any:
        # DistributedModelParallel moves what it has not sharded to its device.
        if inside("DistributedModelParallel", "torchrec.distributed.model_parallel"):
            self._checked = False
            self.check_sharding()
        return super()._apply(fn, recurse)
