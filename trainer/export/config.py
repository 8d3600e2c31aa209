"""Configuration of `recpress export`. Does not import torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from recpress.data.errors import InputError


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Write a trained model as programs that serve without recpress, or check what was written."""

    model: str = ""
    """The model of `recpress train`, or factors of `recpress factorize`."""
    out: str = ""
    """Folder of the export."""
    check: str = ""
    """An export: run its programs on its golden batch, in a process that cannot import recpress. Nothing is written."""
    data: str = ""
    """The log, with its vocabularies and side tables; default: the log that the model names."""
    storage: Literal["fp32", "fp16", "int8", "int4"] = "int8"
    """How to store the rows of tables. Frozen tables that have fewer bits already do not change."""
    inline_mb: float = 64.0
    """Tensors of more MB are files next to the program, which `load.py` maps into memory; smaller ones are in it."""
    factory: str = ""
    """Address `pkg.module:make` of the model's factory, as `train --model` had it; for models of your own."""
    aot: bool = False
    """Compile the programs with AOTInductor too: for CUDA if this machine has it, otherwise for its CPU."""
    index: Literal["auto", "faiss", "usearch", "none"] = "auto"
    """Library of the nearest-neighbor index of item vectors; `auto`: faiss; none for a model without vectors."""
    index_recall: float = 0.98
    """Least recall@100 of the index against exact search, for a sample of users. It decides on the search's effort."""
    triton: bool = False
    """Write a model repository of Triton too."""
    overwrite: bool = False
    """Replace an export of this name."""

    def __post_init__(self) -> None:
        if self.check:
            if self.model or self.out:
                raise InputError("check: an export is checked by itself; expected no --model and no --out")
            return
        for name in ("model", "out"):
            if not getattr(self, name):
                raise InputError(f"{name}: missing; expected --model DIR --out DIR, or --check DIR")
        if not self.inline_mb >= 0:
            raise InputError(f"inline_mb is {self.inline_mb}, expected at least 0")
        if not 0 < self.index_recall <= 1:
            raise InputError(f"index_recall is {self.index_recall}, expected a number in (0, 1]")
