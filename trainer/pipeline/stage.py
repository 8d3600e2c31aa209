"""`recpress pipeline`: factorize, hash, train and evaluate, resuming at the first stage that is not complete."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch.distributed as dist

from recpress.data.dataset import artifact, object_store
from recpress.data.dataset.log import Log, open_log
from recpress.data.errors import InputError
from recpress.trainer.artifacts.factors import FACTORS, MODEL, fingerprints_of
from recpress.trainer.artifacts.id_maps import HASH
from recpress.trainer.config import chosen_schema
from recpress.trainer.config_file import current_names
from recpress.trainer.distributed.heartbeat import waiting_for_ranks
from recpress.trainer.distributed.process_group import Ranks, process_group
from recpress.trainer.distributed.rank_errors import raise_on_all_ranks
from recpress.trainer.errors import same_command_resumes
from recpress.trainer.evaluate.config import PARTS, EvaluateConfig
from recpress.trainer.evaluate.stage import evaluate, label_model, show_predictions
from recpress.trainer.factorize.stage import factorize
from recpress.trainer.features.resolve import check_features, open_with_features
from recpress.trainer.hash.stage import make_maps
from recpress.trainer.observability.logging_setup import stage_name
from recpress.trainer.pipeline.config import PipelineConfig, StageConfig, StageName
from recpress.trainer.pipeline.summary import as_table, below_popularity, summarize
from recpress.trainer.train.config import TWO_TOWER, TrainModelConfig
from recpress.trainer.train.stage import train_any

logger = logging.getLogger(__name__)

RUN: dict[StageName, Callable[[Any], Any]] = {
    "factorize": factorize,
    "hash": make_maps,
    "train": train_any,
}
KINDS = {"factorize": FACTORS, "hash": HASH, "train": MODEL}
SHOWN = 8
"""Settings that differ, in one error."""
_ELSEWHERE = ("data", "out", "device", "overwrite", "tensorboard", "checkpoint", "stall_seconds")
"""Settings that may differ from those that an artifact was made with; of `data`, the fingerprints are compared."""
_PATHS = ("factors", "hash", "maps")


def pipeline(config: PipelineConfig) -> list[StageName]:
    """Run the stages of `config` that are not complete yet; returns which. Collective.

    A stage is complete when its output has its final name, so the same command, given again after a failure or by a
    scheduler that requeues, resumes at the stage that failed; `recpress train` itself resumes from its last checkpoint.

    Raises:
        InputError: an output was made with other settings or from another log, or is later than one that is missing;
            whatever a stage raises. On every rank.
        Preempted: a signal stopped it.
    """
    with process_group(config.device) as ranks, same_command_resumes():
        return _pipeline(config, ranks)


def _pipeline(config: PipelineConfig, ranks: Ranks) -> list[StageName]:
    left: list[StageName] = []
    with raise_on_all_ranks():
        stages = config.chosen()
        log = open_log(config.data, chosen_schema(config.schema), skip_bad=True, pairs=config.needs_pairs)
    held_out = _held_out(stages, log)
    if "evaluate" in stages and len(stages) > 1 and not held_out:
        del stages["evaluate"]
        _say(f"{config.data} has no held-out rows, so nothing is evaluated; `recpress split` holds some out")
    with raise_on_all_ranks():
        if ranks.rank == 0:
            left = _left(stages, log)
    plan: list[Any] = [left]
    with waiting_for_ranks():
        dist.broadcast_object_list(plan)  # what rank 0 saw: shared storage may show another rank another moment
    left = plan[0]
    for name, stage in stages.items():
        _say(f"{name} -> {stage.out}" if name in left else f"{name}: {stage.out} is complete")
        with stage_name(name):
            if isinstance(stage, EvaluateConfig) and _predicts(stage):
                _measure(stage, ranks) if name in left else _show_measured(stage, ranks)
            elif isinstance(stage, EvaluateConfig):
                methods = _evaluate(stages, stage, ranks) if name in left else _evaluated(stage, ranks)
                if ranks.rank == 0 and methods:
                    print(f"held-out rows\n{as_table(methods)}", flush=True)
            elif name in left:
                RUN[name](stage)
    outputs = ", ".join(f"{name} {stage.out}" for name, stage in stages.items())
    if ranks.rank == 0:
        print(f"outputs: {outputs}", flush=True)
    return left


def _held_out(stages: Mapping[StageName, StageConfig], log: Log) -> bool:
    """Whether the log has rows to evaluate; of a model of labels, with labels. Checks its features. Collective."""
    training = stages.get("train")
    if not isinstance(training, TrainModelConfig):
        return log.test is not None or log.test_negatives is not None
    skip = training.stream.on_bad_file == "skip"
    opened = open_with_features(training.data, chosen_schema(training.schema), training.features, skip=skip)
    label = opened.schema.label
    with raise_on_all_ranks():
        check_features(opened, training.features, label)
    return any(part is not None and label in part.columns for part in (opened.test, opened.val))


def _evaluate(stages: dict[StageName, StageConfig], stage: EvaluateConfig, ranks: Ranks) -> dict[str, dict[str, Any]]:
    """Rank the held-out rows by what the pipeline made, and write the metrics of each method. Collective."""
    with raise_on_all_ranks():
        log = open_log(stage.data, chosen_schema(stage.schema))
    made = {name: stages[name].out for name in ("factorize", "train") if name in stages}
    methods = summarize(log, stage, made.get("factorize"), made.get("train"), ranks)
    with raise_on_all_ranks():
        if ranks.rank == 0:
            last = list(methods.values())[-1]["metrics"]
            warning = below_popularity(methods)
            content = {**last, "methods": methods, "warnings": [warning] if warning else [], "log": log.inputs()}
            assert stage.out is not None
            object_store.write_bytes(stage.out, (json.dumps(content, indent=1) + "\n").encode())
            if warning:
                logger.warning("%s: %s", stage.out, warning)
    return methods


def _predicts(stage: EvaluateConfig) -> bool:
    """Whether the model to evaluate predicts labels. Collective."""
    found = False
    with raise_on_all_ranks():
        found = label_model(artifact.read_manifest(stage.model)) is not None
    return found


def _measure(stage: EvaluateConfig, ranks: Ranks) -> None:
    """Measure the predictions of a model of labels, and write the metrics of each part. Collective."""
    parts = evaluate(replace(stage, out=None))
    with raise_on_all_ranks():
        if ranks.rank == 0:
            assert stage.out is not None
            log = open_log(stage.data, chosen_schema(stage.schema), pairs=False)
            content = {**parts, "log": log.inputs()}
            object_store.write_bytes(stage.out, (json.dumps(content, indent=1) + "\n").encode())


def _show_measured(stage: EvaluateConfig, ranks: Ranks) -> None:
    """Print what `_measure` wrote. Collective."""
    with raise_on_all_ranks():
        content = _written(str(stage.out)) if ranks.rank == 0 else {}
    for part in PARTS:
        if part in content:
            print(f"{stage.model}, {part}: {show_predictions(content[part])}", flush=True)


def _evaluated(stage: EvaluateConfig, ranks: Ranks) -> dict[str, dict[str, Any]]:
    """The metrics of each method that `_evaluate` wrote; {} on ranks other than 0. Collective."""
    with raise_on_all_ranks():
        content = _written(str(stage.out)) if ranks.rank == 0 else {}
    for warning in content.get("warnings", []):
        logger.warning("%s: %s", stage.out, warning)
    return dict(content.get("methods", {}))


def _written(path: str) -> dict[str, Any]:
    """What `_evaluate` wrote."""
    try:
        content = json.loads(object_store.read_bytes(path))
    except ValueError as error:
        raise InputError(f"{path}: not metrics of a pipeline: {error}; remove it") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: not metrics of a pipeline; remove it")
    return content


def _left(stages: dict[StageName, StageConfig], log: Log) -> list[StageName]:
    """Stages whose output is not there. Raises InputError if what is there cannot be built upon."""
    left: list[StageName] = []
    prints: dict[str, Any] = {}
    stale: dict[str, str] = {}
    for name, stage in stages.items():
        assert stage.out is not None
        if not _is_there(name, stage.out):
            left.append(name)
            continue
        if left:
            raise InputError(
                f"{stage.out}: is there, but {stages[left[0]].out}, which comes before it, is not; remove it"
            )
        if name in KINDS:
            _check_settings(name, stage)
        if stage.data not in prints:
            same = stage.data == log.path
            used = log if same else open_log(stage.data, chosen_schema(stage.schema), skip_bad=True, pairs=False)
            prints[stage.data] = fingerprints_of(used.inputs())
        files = _log_files(name, stage.out)
        if files is not None and fingerprints_of(files) != prints[stage.data]:
            stale[stage.out] = stage.data
    if stale:
        first = next(iter(stale))
        later = [str(stage.out) for stage in stages.values() if _is_there("evaluate", str(stage.out))]
        raise InputError(
            f"{first}: made from other files than {stale[first]} has now (their fingerprints differ); remove "
            f"{' and '.join(later)}, or choose another out"
        )
    return left


def _is_there(name: StageName, path: str) -> bool:
    if not object_store.is_remote(path):
        return Path(path).exists()
    if name in KINDS:
        path = object_store.join(path, artifact.MANIFEST)
    try:
        object_store.read_bytes(path)
    except FileNotFoundError:
        return name == "evaluate" and artifact.MANIFEST in object_store.list_files(path)
    return True


def _log_files(name: StageName, path: str) -> list[dict[str, Any]] | None:
    """The files of the log that an output was made from; None if it does not say."""
    files = artifact.read_manifest(path, KINDS[name])["log"]["files"] if name in KINDS else _written(path).get("log")
    return list(files) if files is not None else None


def _is_path(key: str) -> bool:
    return key in _PATHS or (key.startswith("features.") and key.endswith(".frozen"))


def _same_place(key: str, made: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    """Whether a folder is at the same path from the output: `out/factors` from any working folder, with or without a
    slash at its end."""
    paths = [str(config.get(name) or "") for config in (made, wanted) for name in (key, "out")]
    if any(not path or object_store.is_remote(path) for path in paths):
        return False
    return os.path.relpath(*paths[:2]) == os.path.relpath(*paths[2:])


def _check_settings(name: StageName, stage: StageConfig) -> None:
    """Raise InputError naming the settings with which the artifact was made otherwise."""
    assert stage.out is not None
    manifest = artifact.read_manifest(stage.out, KINDS[name])
    made = _flat(current_names(manifest["config"]))
    wanted = _flat(json.loads(json.dumps(asdict(stage))))
    if name == "train":
        made["factory"] = label_model(manifest) or TWO_TOWER
        wanted.setdefault("factory", TWO_TOWER)
    features = {key for key in made.keys() | wanted.keys() if key.startswith("features.")}
    other = [
        key
        for key in (made.keys() & wanted.keys()) | features
        if made.get(key) != wanted.get(key)
        and key.split(".")[0] not in _ELSEWHERE
        and not (_is_path(key) and _same_place(key, made, wanted))
    ]
    if other:
        shown = ", ".join(
            f"{name}.{key} = {made.get(key)!r} (now {wanted.get(key)!r})" for key in sorted(other)[:SHOWN]
        )
        raise InputError(f"{stage.out}: made with {shown}; remove it, or choose another out")


def _flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in config.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return found


def _say(text: str) -> None:
    if dist.get_rank() == 0:
        logger.info("%s", text)
