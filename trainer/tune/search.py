"""The search of `recpress tune`: trials within a budget of time, and the TOML file of the best."""

from __future__ import annotations

import json
import logging
import re
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist

from recpress.data.dataset import object_store
from recpress.data.dataset.atomic import replacing
from recpress.data.errors import InputError
from recpress.trainer.distributed.process_group import Ranks
from recpress.trainer.distributed.rank_errors import raise_on_all_ranks
from recpress.trainer.tune.config import SearchConfig

logger = logging.getLogger(__name__)
Trial = TypeVar("Trial")


def open_folder(config: SearchConfig, ranks: Ranks, stack: ExitStack) -> str:
    """A temporary folder for the trials, which all ranks see: next to `out`. Collective.

    Raises:
        InputError: `out` cannot be written. On every rank.
    """
    folders: list[str] = [""]
    with raise_on_all_ranks():
        if object_store.is_remote(config.out):
            raise InputError(f"{config.out}: expected a local file")
        if Path(config.out).exists() and not config.overwrite:
            raise InputError(f"{config.out}: exists; choose another --out, or --overwrite")
        if not Path(config.out).resolve().parent.is_dir():
            raise InputError(f"{config.out}: its folder does not exist; create it first")
        if ranks.rank == 0:
            parent = Path(config.out).resolve().parent
            folders = [stack.enter_context(tempfile.TemporaryDirectory(prefix=".tune-", dir=parent))]
    dist.broadcast_object_list(folders)
    return folders[0]


def search(
    config: SearchConfig,
    candidates: Sequence[Trial],
    score: Callable[[int, Trial], float],
    *,
    began: float,
    metric: str,
    smaller_is_better: bool = False,
) -> list[tuple[Trial, float]]:
    """The candidates that the budget allows, at least the first, with their scores, best first. Collective.

    Args:
        score: (number, candidate) -> its metric on validation rows.
        began: `time.monotonic()` at the start of the budget.
    """
    found: list[tuple[Trial, float]] = []
    for number, trial in enumerate(candidates):
        spent = time.monotonic() - began
        left = [config.minutes * 60 - spent - spent / max(number, 1)]
        dist.broadcast_object_list(left)
        if number and left[0] < 0:
            break
        say(f"network {number + 1} of {config.trials}: {trial}; {spent:.0f} s of {config.minutes * 60:.0f} s spent")
        found.append((trial, score(number, trial)))
        say(f"{metric} {found[-1][1]:.4f} on validation rows")
    # stable: of equals the first, so that the defaults win a tie
    found.sort(key=lambda trial: trial[1] if smaller_is_better else -trial[1])
    return found


def write(path: str, settings: Mapping[str, Any], found: Sequence[tuple[Any, float]], note: str = "") -> None:
    """Write the settings as TOML, with the trials in comments."""
    lines = [f"# Written by `recpress tune`: --config of every command takes what concerns it.{note}"]
    lines += [f"# {score:.4f}  {trial}" for trial, score in found]
    lines += _tables(settings, "")
    with replacing(path) as temporary:
        temporary.write_text("\n".join(lines) + "\n")


def _tables(settings: Mapping[str, Any], name: str) -> list[str]:
    values = {key: value for key, value in settings.items() if not isinstance(value, Mapping)}
    lines = [f"[{name}]"] if name and (values or not settings) else []
    lines += [f"{_key(key)} = {json.dumps(value)}" for key, value in values.items()]
    for key, value in settings.items():
        if isinstance(value, Mapping):
            lines += _tables(value, f"{name}.{_key(key)}" if name else _key(key))
    return lines


def _key(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else json.dumps(name)


def say(text: str) -> None:
    """Log it on rank 0."""
    if dist.get_rank() == 0:
        logger.info("%s", text)
