"""Checks that a run may resume from a checkpoint: same settings, log, factors and id maps."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from recpress.data.errors import InputError
from recpress.trainer.config_file import current_names

ALLOWED = (
    "out",
    "overwrite",
    "device",
    "tensorboard",
    "stop_after",
    "stall_seconds",
    "on_nonfinite",
    "evaluation.patience",
    "stream.num_threads",
    "stream.on_bad_file",
    "follow.seconds",
    "follow.idle_minutes",
    "stream.prefetch_batches",
    "data",
    "factors",
    "hash",
    "maps",
)
ALLOWED_SECTIONS = ("checkpoint.", "watch.", "metrics.", "profile.")
"""Keys and sections of the configuration that may change before a resume. The content at `data`, `factors`, `hash`
and `maps` must stay the same."""


def check_resume(path: object, made: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise InputError if the checkpoint at `path` is of a run with other settings, log, factors or id maps.

    Args:
        made: its manifest.
        now: of this run: `config` (nested, JSON values) and `inputs` (name -> fingerprint).
    """
    before, after = dict(_flat(current_names(made["config"]))), dict(_flat(json.loads(json.dumps(now["config"]))))
    changed = [
        key
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key) and key not in ALLOWED and not key.startswith(ALLOWED_SECTIONS)
    ]
    if changed:
        each = "; ".join(f"{key}: {before.get(key)!r} -> {after.get(key)!r}" for key in changed)
        raise InputError(
            f"{path}: written with other settings ({each}). When a run resumes, only {', '.join(ALLOWED)} and "
            "checkpoint.*, watch.*, metrics.* and profile.* may change; to start over: --checkpoint.no-resume"
        )
    for name in sorted(made["inputs"].keys() | now["inputs"].keys()):
        if made["inputs"].get(name) != now["inputs"].get(name):
            raise InputError(
                f"{path}: written with another {name}: fingerprint {made['inputs'].get(name)}, now "
                f"{now['inputs'].get(name)}; to start over: --checkpoint.no-resume"
            )


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
