"""Finds optimizers that would train weights which are no longer in the model."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Mapping

import torch


def warn_of_optimizers(replaced: Mapping[str, torch.Tensor]) -> None:
    """Warn about each existing optimizer that holds the old weight of a table: it will not train the new one.

    Args:
        replaced: table name -> its old weight.
    """
    tables = {id(weight): table for table, weight in replaced.items()}
    for optimizer in [found for found in gc.get_objects() if issubclass(type(found), torch.optim.Optimizer)]:
        for group in getattr(optimizer, "param_groups", ()):
            names = sorted({tables[id(weight)] for weight in group["params"] if id(weight) in tables})
            if names and not any(optimizer in getattr(w, "_in_backward_optimizers", ()) for w in group["params"]):
                warnings.warn(
                    f"compress: {type(optimizer).__name__} was created before and holds the old weight of table "
                    f"{names[0]!r}, so it does not train the new one; create the optimizer after compress",
                    stacklevel=4,
                )
                return
