"""Optimizers of trained tables, which FBGEMM fuses into the backward pass. Does not import torch."""

from __future__ import annotations

from dataclasses import dataclass

from recpress.data.errors import InputError
from recpress.trainer.config import TableOptimizer


@dataclass(frozen=True)
class TableOptimizerKind:
    """What an optimizer needs."""

    torchrec: str
    """Its class in `torchrec.optim`."""
    per_row: int
    """Numbers of state per row."""
    per_value: int
    """Numbers of state per value of a row."""
    cpu: bool
    """Whether FBGEMM has it on CPUs too."""
    counts_steps: bool = False
    """Whether an update depends on the number of updates before it."""

    @property
    def state(self) -> str:
        """The bytes of its state."""
        parts = [f"{4 * count} B{of}" for count, of in ((self.per_value, " x dim"), (self.per_row, "")) if count]
        return f"{' + '.join(parts)} per row" if parts else "none"


TABLE_OPTIMIZERS: dict[TableOptimizer, TableOptimizerKind] = {
    "row-wise-adagrad": TableOptimizerKind("RowWiseAdagrad", 1, 0, cpu=True),
    "adagrad": TableOptimizerKind("Adagrad", 0, 1, cpu=True),
    "sgd": TableOptimizerKind("SGD", 0, 0, cpu=True),
    "adam": TableOptimizerKind("Adam", 0, 2, cpu=False, counts_steps=True),
    "row-wise-adam": TableOptimizerKind("PartialRowWiseAdam", 1, 1, cpu=False, counts_steps=True),
    "lamb": TableOptimizerKind("LAMB", 0, 2, cpu=False, counts_steps=True),
    "row-wise-lamb": TableOptimizerKind("PartialRowWiseLAMB", 1, 1, cpu=False, counts_steps=True),
    "lars": TableOptimizerKind("LarsSGD", 0, 1, cpu=False),
}


def check_table_optimizer(name: TableOptimizer, device_type: str) -> None:
    """Raise InputError if FBGEMM does not have this optimizer on this device."""
    if device_type == "cpu" and not TABLE_OPTIMIZERS[name].cpu:
        known = ", ".join(other for other, kind in TABLE_OPTIMIZERS.items() if kind.cpu)
        raise InputError(
            f"optimizer.tables is {name}, which FBGEMM has on GPUs only; expected one of {known} on the device cpu"
        )
