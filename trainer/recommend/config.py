"""Configuration of `recpress recommend`. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from recpress.data.config import Schema
from recpress.trainer.config import at_least


@dataclass(frozen=True, kw_only=True)
class RecommendConfig:
    """Write the best items of each user, by a model or by factors, as Parquet with raw ids.

    A run that was stopped resumes if the same command is run again, also with another number of processes.
    """

    model: str
    """A model of `recpress train`, or factors of `recpress factorize`."""
    out: str
    """Folder of the recommendations; must not exist unless --overwrite."""
    data: str | None = None
    """The users: a log, for all of its users, or Parquet or CSV (a file, a glob, a folder) with a column of user ids.
    Default: the log that the model was trained on."""
    log: str | None = None
    """The log that has the raw ids and the items that a user has seen. Default: --data if that is a log, else the log
    that the model was trained on. Its ids must be those of the model."""
    k: int = 100
    """Items per user."""
    exclude_seen: bool = True
    """Omit items that the user has in the `train` and `val` rows of the log."""
    index: str | None = None
    """An export of the model (`recpress export`): its index proposes items, which are then scored exactly. Faster among
    millions of items, but it may miss some; the manifest has the recall. Default: exact."""
    on_unknown: Literal["stop", "skip"] = "stop"
    """A user without an id in the log: `stop` ends the command; `skip` writes it to unknown_users.parquet."""
    users_per_part: int = 16_384
    """Users per output file. A run that resumes skips finished files."""
    schema: Schema = field(default_factory=Schema)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device of the scores."""
    overwrite: bool = False
    """Replace an existing --out, and discard the parts of a run with other settings."""

    def __post_init__(self) -> None:
        at_least(1, k=self.k, users_per_part=self.users_per_part)
