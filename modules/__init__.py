"""Factorization, id maps, frozen tables and the two-tower network: functions and `nn.Module`s that need no trainer.

The public names load on first use, so that `recpress.modules.config` needs no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from recpress.modules.als.factorization import ALS
    from recpress.modules.als.factors import Factors, FactorTable
    from recpress.modules.als.fold_in import fold_in
    from recpress.modules.compression.replace import compress
    from recpress.modules.compression.report import CompressReport
    from recpress.modules.compression.sharders import sharders
    from recpress.modules.config import ALSConfig, ContrastiveConfig, HashConfig, TwoTowerConfig
    from recpress.modules.contrastive.factorization import Contrastive
    from recpress.modules.frozen.collection import FrozenEmbeddingBagCollection, FrozenEmbeddingBagCollectionSharder
    from recpress.modules.frozen.kernel import FrozenTable
    from recpress.modules.frozen.sequence import FrozenEmbeddingCollection, FrozenEmbeddingCollectionSharder
    from recpress.modules.hashing.extend import extend_map
    from recpress.modules.hashing.id_map import IdMap
    from recpress.modules.hashing.learned_hash import LearnedHash
    from recpress.modules.hashing.managed_collision import LearnedCollisionModule
    from recpress.modules.hashing.mapped_hash import MappedHash
    from recpress.modules.hashing.methods import build_map
    from recpress.modules.hashing.table_stats import TableStats
    from recpress.modules.id_check import check_ids
    from recpress.modules.row_files import open_rows
    from recpress.modules.two_tower.model import SideSpec, TwoTower

__all__ = [
    "ALS",
    "ALSConfig",
    "CompressReport",
    "Contrastive",
    "ContrastiveConfig",
    "FactorTable",
    "Factors",
    "FrozenEmbeddingBagCollection",
    "FrozenEmbeddingBagCollectionSharder",
    "FrozenEmbeddingCollection",
    "FrozenEmbeddingCollectionSharder",
    "FrozenTable",
    "HashConfig",
    "IdMap",
    "LearnedCollisionModule",
    "LearnedHash",
    "MappedHash",
    "SideSpec",
    "TableStats",
    "TwoTower",
    "TwoTowerConfig",
    "build_map",
    "check_ids",
    "compress",
    "extend_map",
    "fold_in",
    "open_rows",
    "sharders",
]

_MODULES = {
    "als.factorization": ("ALS",),
    "als.factors": ("FactorTable", "Factors"),
    "als.fold_in": ("fold_in",),
    "compression.replace": ("compress",),
    "compression.report": ("CompressReport",),
    "compression.sharders": ("sharders",),
    "config": ("ALSConfig", "ContrastiveConfig", "HashConfig", "TwoTowerConfig"),
    "contrastive.factorization": ("Contrastive",),
    "frozen.collection": ("FrozenEmbeddingBagCollection", "FrozenEmbeddingBagCollectionSharder"),
    "frozen.kernel": ("FrozenTable",),
    "frozen.sequence": ("FrozenEmbeddingCollection", "FrozenEmbeddingCollectionSharder"),
    "hashing.extend": ("extend_map",),
    "hashing.id_map": ("IdMap",),
    "hashing.learned_hash": ("LearnedHash",),
    "hashing.managed_collision": ("LearnedCollisionModule",),
    "hashing.mapped_hash": ("MappedHash",),
    "hashing.methods": ("build_map",),
    "hashing.table_stats": ("TableStats",),
    "id_check": ("check_ids",),
    "row_files": ("open_rows",),
    "two_tower.model": ("SideSpec", "TwoTower"),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    """Import a public name on first use (PEP 562)."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
