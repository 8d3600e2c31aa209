"""`recpress pipeline`: factorize, hash, train and evaluate, going on at the first stage that is not whole."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch.distributed as dist
from recpress.data import artifact
from recpress.data.errors import InputError
from recpress.trainer.artifacts import FACTORS, MODEL
from recpress.trainer.distributed.process_group import agreed, process_group
from recpress.trainer.evaluate.stage import evaluate
from recpress.trainer.factorize.stage import factorize
from recpress.trainer.hash.id_maps import HASH
from recpress.trainer.hash.stage import make_maps
from recpress.trainer.pipeline.config import PipelineConfig, StageConfig, StageName
from recpress.trainer.train.stage import train

RUN: dict[StageName, Callable[[Any], Any]] = {
    "factorize": factorize,
    "hash": make_maps,
    "train": train,
    "evaluate": evaluate,
}
KINDS = {"factorize": FACTORS, "hash": HASH, "train": MODEL}
_ELSEWHERE = ("device", "overwrite", "tensorboard", "checkpoint", "stall_seconds")
"""Settings that may differ from those that an artifact was made with."""


def pipeline(config: PipelineConfig) -> list[StageName]:
    """Run the stages of `config` that are not whole yet; returns which. Collective.

    A stage is whole when its output has its final name, so the same command, given again after a failure or by a
    scheduler that requeues, goes on at the stage that failed; `recpress train` itself goes on at its last checkpoint.

    Raises:
        InputError: an output was made with other settings, or is later than one that is missing; whatever a stage
            raises. On every rank.
    """
    with process_group(config.device) as ranks:
        left: list[StageName] = []
        with agreed():
            stages = config.chosen()
            if ranks.rank == 0:
                Path(config.out).mkdir(parents=True, exist_ok=True)
                left = _left(stages)
        plan: list[Any] = [left]
        dist.broadcast_object_list(plan)  # what rank 0 saw: shared storage may show another rank another moment
        left = plan[0]
        for name, stage in stages.items():
            if name in left:
                _say(f"{name} -> {stage.out}")
                RUN[name](stage)
            else:
                _say(f"{name}: {stage.out} is whole")
    return left


def _left(stages: dict[StageName, StageConfig]) -> list[StageName]:
    """Stages whose output is not there. Raises InputError where what is there cannot be built upon."""
    left: list[StageName] = []
    for name, stage in stages.items():
        assert stage.out is not None
        if not Path(stage.out).exists():
            left.append(name)
        elif left:
            raise InputError(
                f"{stage.out}: is there, but {stages[left[0]].out}, which comes before it, is not; remove it"
            )
        elif name in KINDS:
            _check_settings(name, stage)
    return left


def _check_settings(name: StageName, stage: StageConfig) -> None:
    """Raise InputError naming the settings with which the artifact was made otherwise."""
    assert stage.out is not None
    made = _flat(artifact.read_manifest(stage.out, KINDS[name])["config"])
    wanted = _flat(json.loads(json.dumps(asdict(stage))))
    other = [
        key for key in made.keys() & wanted.keys() if made[key] != wanted[key] and key.split(".")[0] not in _ELSEWHERE
    ]
    if other:
        shown = ", ".join(f"{name}.{key} = {made[key]!r} (now {wanted[key]!r})" for key in sorted(other))
        raise InputError(f"{stage.out}: made with {shown}; remove it, or choose another out")


def _flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in config.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return found


def _say(text: str) -> None:
    if dist.get_rank() == 0:
        print(f"pipeline: {text}", flush=True)
