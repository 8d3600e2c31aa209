"""Import paths and names of version 0.1, which work for one release with a DeprecationWarning."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

MOVED = {
    "recpress.data.columns": "recpress.data.dataset.columns",
    "recpress.data.holdout": "recpress.data.ingest.split",
    "recpress.data.keyed": "recpress.data.stream.keyed",
    "recpress.data.log": "recpress.data.dataset.log",
    "recpress.data.rows": "recpress.data.dataset.parquet_split",
    "recpress.data.side_table": "recpress.data.dataset.side_table",
    "recpress.data.synth": "recpress.data.synthetic.interactions",
    "recpress.modules.compress": "recpress.modules.compression.replace",
    "recpress.modules.factors": "recpress.modules.als.factors",
    "recpress.modules.fold_in": "recpress.modules.als.fold_in",
    "recpress.modules.frozen_sharded": "recpress.modules.frozen.collection",
    "recpress.modules.hashing.problem": "recpress.modules.hashing.table_stats",
    "recpress.modules.learned_hash": "recpress.modules.hashing.learned_hash",
    "recpress.modules.managed_collision": "recpress.modules.hashing.managed_collision",
    "recpress.modules.mapped_hash": "recpress.modules.hashing.mapped_hash",
    "recpress.modules.rows": "recpress.modules.row_source",
}
NAMES = {
    "recpress.data.log": {"iter_columns": "recpress.data.sampling.scan:iter_columns"},
    "recpress.data.rows": {
        "Rows": "recpress.data.dataset.parquet_split:ParquetSplit",
        "iter_columns": "recpress.data.sampling.scan:iter_columns",
    },
    "recpress.modules.hashing.problem": {"IdTable": "recpress.modules.hashing.table_stats:TableStats"},
}
"""Old module -> its names that are elsewhere, or under another name."""


class _Moved(ModuleType):
    """Takes each name from the module that has it now."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        module, _, now = NAMES.get(self.__name__, {}).get(name, "").partition(":")
        return getattr(importlib.import_module(module or MOVED[self.__name__]), now or name)

    def __call__(self, *args: Any, **values: Any) -> Any:
        """`recpress.modules.compress` was a module and is a function."""
        return getattr(self, self.__name__.rpartition(".")[2])(*args, **values)


class Finder(MetaPathFinder, Loader):
    """Finds the modules of `MOVED`, and no others."""

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: Any = None) -> ModuleSpec | None:
        return ModuleSpec(fullname, self) if fullname in MOVED else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _Moved(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        now = MOVED[module.__name__]
        warnings.warn(
            f"{module.__name__} is now {now}; the old path ends with the next release", DeprecationWarning, stacklevel=2
        )
