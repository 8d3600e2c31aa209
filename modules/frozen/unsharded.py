"""Finds frozen tables that DistributedModelParallel has not sharded, at its call or in the first forward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from recpress.modules.frozen.kernel import FrozenTable
from recpress.modules.stack import on_stack

_PARALLEL = ("DistributedModelParallel", "torchrec.distributed.model_parallel")


class Unsharded(nn.Module):
    """Base of the plain collections. Without their sharder, each rank would silently hold all rows."""

    _checked = False

    def tables(self) -> list[FrozenTable]:
        raise NotImplementedError

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
        if on_stack(*_PARALLEL) is not None:
            raise ValueError(
                f"frozen table {name!r}: DistributedModelParallel has not sharded it, so each rank would hold all "
                "rows; pass `sharders=recpress.modules.sharders()` to it, and to its planner"
            )
        self._checked = True

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Any:
        # DistributedModelParallel moves what it has not sharded to its device.
        if on_stack(*_PARALLEL) is not None:
            self._checked = False
            self.check_sharding()
        return super()._apply(fn, recurse)
