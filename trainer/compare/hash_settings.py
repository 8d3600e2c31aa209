"""The methods of `compare hash`, and the settings that are searched for each."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, cast

from recpress.modules.config import HashConfig, HashMethod
from recpress.modules.hashing.methods import JOINT_METHODS
from recpress.trainer.compare.config import CompareHashConfig

BY_IDS, BY_DISTORTION = -1.0, -2.0
"""Share of the budget for the users: in proportion to the ids; by `split_rows`."""

NAMES = {
    "modulo": ("Modulo", "id mod rows: the hashing trick."),
    "universal": ("Universal hash", "The hashing trick with a hash that mixes."),
    "double": ("Double hash", "The sum of two hashed rows."),
    "frequency": ("Frequency", "The most frequent ids have exclusive rows, the rest share by modulo."),
    "hybrid": ("Hybrid", "The most frequent ids have exclusive rows, the rest share by double hash."),
    "quotient-remainder": (
        "Quotient-remainder",
        "The sum of a row by quotient and one by remainder (Shi et al.).",
    ),
    "louvain": ("Louvain (GraphHash)", "Communities of the interaction graph (GraphHash, WWW 2025)."),
    "co-cluster": ("Co-clustering (BACO)", "Balanced clusters of the interaction graph (BACO, SIGIR 2026)."),
    "cluster": ("Cluster", "k-means of the factors, without the counts."),
    "learned": ("Learned, one row", "Clusters of the factors, weighted by the counts; rows go to the larger gain."),
    "learned-2": ("Learned", "Two weighted rows per id, from factors and counts together."),
}
"""Key -> (name, description)."""
_FROM_FACTORS = ("cluster", "learned", "learned-2")


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What is chosen for a method on the validation examples."""

    hash: HashConfig
    user_share: float = BY_IDS
    """Share of the rows for users; or BY_IDS, BY_DISTORTION."""
    sweeps: int | None = 1
    """Sweeps or epochs of the factorization with shared rows, from the rows that are nearest to the full factors; None
    with another backbone."""

    def words(self) -> dict[str, Any]:
        """For reports: what was chosen, by name."""
        names = {BY_IDS: "by ids", BY_DISTORTION: "by distortion"}
        chosen: dict[str, Any] = {}
        if self.hash.method not in JOINT_METHODS:
            chosen["users' share of rows"] = names.get(self.user_share, self.user_share)
        if self.hash.method in ("frequency", "hybrid"):
            chosen["exclusive_share"] = self.hash.exclusive_share
        if self.hash.method in ("learned", "co-cluster"):
            chosen["count_exponent"] = self.hash.count_exponent
        return chosen | ({} if self.sweeps is None else {"sweeps": self.sweeps})


def search_axes(config: CompareHashConfig, method: str) -> dict[str, tuple[Any, ...]]:
    """The settings that a method has, by axis; the search starts at the first value of each."""
    axes: dict[str, tuple[Any, ...]] = {}
    if method not in JOINT_METHODS:
        axes["user_share"] = (BY_IDS, *config.user_shares, *((BY_DISTORTION,) if method in _FROM_FACTORS else ()))
    if method in ("frequency", "hybrid"):
        axes["exclusive_share"] = (0.5, *config.exclusive_shares)
    if method.startswith("learned") or method == "co-cluster":
        axes["count_exponent"] = (config.hash.count_exponent, *config.count_exponents)
    if config.backbone == "als":
        axes["sweeps"] = tuple(sorted(config.sweeps, key=lambda sweeps: abs(sweeps - 1)))
    elif config.backbone == "softmax":
        axes["sweeps"] = tuple(sorted(config.shared_epochs, reverse=True))
    return axes


def setting_of(config: CompareHashConfig, method: str, values: dict[str, Any]) -> Setting:
    """A point on the axes."""
    two_rows = method == "learned-2"
    hashed = replace(
        config.hash,
        method=cast(HashMethod, "learned" if two_rows else method),
        rows_per_id=2 if two_rows else 1,
        **{axis: values[axis] for axis in ("exclusive_share", "count_exponent") if axis in values},
    )
    return Setting(hash=hashed, user_share=values.get("user_share", BY_IDS), sweeps=values.get("sweeps"))
