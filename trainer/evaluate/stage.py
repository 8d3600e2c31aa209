"""`recpress evaluate`: a checkpoint or factors, and held-out rows -> ranking metrics."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import torch

from recpress.data.dataset import artifact, object_store
from recpress.data.dataset.log import SIDES, Log, open_log
from recpress.data.errors import InputError
from recpress.trainer.artifacts.factors import FACTORS, MODEL, open_factors
from recpress.trainer.config import EvaluationConfig, chosen_schema
from recpress.trainer.distributed.process_group import Ranks, process_group
from recpress.trainer.distributed.rank_errors import raise_on_all_ranks
from recpress.trainer.evaluate.config import EvaluateConfig
from recpress.trainer.evaluate.heldout import SEEN, FullHeldout, SampledHeldout, full_from_log, sampled_from_log
from recpress.trainer.evaluate.ranking import evaluate_full, evaluate_sampled, vectors_from_factors
from recpress.trainer.model.vectors import VectorFn

logger = logging.getLogger(__name__)


def evaluate(config: EvaluateConfig, per_case: dict[str, torch.Tensor] | None = None) -> dict[str, Any]:
    """Rank the held-out rows of a log. The metrics do not depend on the world size. `per_case`: see `ranking`.

    With a model of labels: part of the log -> metrics of its predictions.

    Raises:
        InputError: the log has no held-out rows, or the model is of another vocabulary. On every rank.
    """
    with process_group(config.device) as ranks:
        return _evaluate(config, ranks, per_case)


def _evaluate(config: EvaluateConfig, ranks: Ranks, per_case: dict[str, torch.Tensor] | None = None) -> dict[str, Any]:
    """`evaluate` within its process group, which must outlive the model: see `process_group`."""
    found: dict[str, Any]
    with raise_on_all_ranks():
        kind = kind_of(config.model)
        manifest = artifact.read_manifest(config.model, kind)
    if kind == MODEL and label_model(manifest):
        from recpress.trainer.evaluate.predictions import evaluate_labelled  # imports torchrec, as below

        found = evaluate_labelled(config, manifest, ranks)
        if ranks.rank == 0:
            for part, metrics in found.items():
                print(f"{config.model}, {part}: {show_predictions(metrics)}")
    else:
        found = _rank(config, kind, ranks, per_case)
    with raise_on_all_ranks():
        if config.out is not None and ranks.rank == 0:
            object_store.write_bytes(config.out, (json.dumps(found, indent=1) + "\n").encode())
    return found


def _rank(
    config: EvaluateConfig, kind: str, ranks: Ranks, per_case: dict[str, torch.Tensor] | None
) -> dict[str, float]:
    with raise_on_all_ranks():
        for option in ("parts", "factory"):
            if getattr(config, option):
                raise InputError(f"{option}: an option of models of labels, but {config.model} ranks; expected none")
        log = open_log(config.data, chosen_schema(config.schema))
    heldout = load_heldout(log, config.evaluation)
    user, item = load_vectors(config.model, kind, log, ranks)
    metrics = rank_heldout(heldout, user, item, config.evaluation, ranks.device, per_case)
    if ranks.rank == 0:
        print(f"{config.model}: {show(metrics)}")
        for line in notes(metrics, log, config.evaluation):
            logger.info("%s", line)
    return metrics


def kind_of(path: str) -> str:
    """Kind of the artifact at `path`: `factors` or `model`. Raises InputError if it is neither."""
    kind = str(artifact.read_manifest(path).get("kind"))
    if kind not in (FACTORS, MODEL):
        raise InputError(
            f"{path}: an artifact of kind '{kind}'; expected factors of `recpress factorize` or a model of "
            "`recpress train`"
        )
    return kind


def load_vectors(path: str, kind: str, log: Log, ranks: Ranks) -> tuple[VectorFn, VectorFn]:
    """The vectors of users and of items of the factors or the model at `path`. Collective.

    Raises:
        InputError: it is corrupt, or of another vocabulary than that of `log`. On every rank.
    """
    if kind == FACTORS:
        with raise_on_all_ranks():
            factors = open_factors(path, log)
            tables = [factors.table(side) for side in SIDES]
        return vectors_from_factors(tables[0]), vectors_from_factors(tables[1])
    from recpress.trainer.model.two_tower import load_model  # imports torchrec, which factors do not need

    model = load_model(path, log, ranks)
    return model.vectors("user"), model.vectors("item")


def label_model(manifest: Mapping[str, Any]) -> str | None:
    """The name of a model of labels, as `recpress train --model` has it; None: another artifact, which ranks."""
    model = manifest.get("model")
    return model.get("name") if isinstance(model, Mapping) else None


def check_that_it_ranks(path: str) -> None:
    """Raise InputError for a model of labels, whose log may lack what a ranking needs. Other errors are `kind_of`'s."""
    manifest: dict[str, Any] = {}
    with suppress(InputError):
        manifest = artifact.read_manifest(path)
    if manifest.get("kind") == MODEL and (name := label_model(manifest)) is not None:
        raise InputError(f"{path}: a model of --model {name}, which does not rank; `recpress evaluate` measures it")


def load_heldout(log: Log, config: EvaluationConfig) -> SampledHeldout | FullHeldout:
    """The held-out rows that the protocol wants; `auto` prefers given negatives. Collective.

    Raises:
        InputError: the log has no such rows; it is a sample, of whose users' items not all could be masked. On every
            rank.
    """
    if config.protocol == "sampled" or (config.protocol == "auto" and log.test_negatives is not None):
        return sampled_from_log(log)
    if log.is_part:
        assert log.sample_of is not None
        raise InputError(
            f"{log.path}: a sample of {log.sample_of['log']}, so not all items that a user has seen could be masked; "
            "for the protocol 'full' expected that log (ids are the same)"
        )
    return full_from_log(log, masked=SEEN)


def rank_heldout(
    heldout: SampledHeldout | FullHeldout,
    user: VectorFn,
    item: VectorFn,
    config: EvaluationConfig,
    device: torch.device,
    per_case: dict[str, torch.Tensor] | None = None,
) -> dict[str, float]:
    """Metrics of the vectors on held-out rows. Collective; the same on every rank. `per_case`: see `ranking`."""
    if isinstance(heldout, SampledHeldout):
        return evaluate_sampled(heldout, user, item, config.k, device=device, per_case=per_case)
    return evaluate_full(heldout, user, item, config.k, device=device, per_case=per_case)


def notes(metrics: dict[str, float], log: Log, config: EvaluationConfig) -> list[str]:
    """Notes about the metrics: cut-offs without meaning, pairs that were not ranked."""
    lines = []
    if large := [k for k in config.k if k >= log.num_items]:
        each = ", ".join(map(str, large))
        lines.append(
            f"k {each}: not below the {log.num_items:,} items of the log; HR and Recall there are 1 for any model"
        )
    if seen := int(metrics.get("heldout_seen", 0)):
        lines.append(f"{seen:,} held-out pairs are in train too; they are masked, and not ranked")
    if cold := int(metrics.get("users_without_train", 0)):
        lines.append(
            f"{cold:,} held-out users have no row in train; they are ranked, and their scores say nothing of them"
        )
    if cold := int(metrics.get("targets_without_train", 0)):
        lines.append(
            f"{cold:,} held-out pairs are of items without a row in train; they are ranked, as misses as a rule"
        )
    return lines


def show(metrics: dict[str, float]) -> str:
    """The metrics in one line, with the number of cases and of skipped pairs."""
    counts = {name: int(value) for name, value in metrics.items() if name.islower() and (value or name == "cases")}
    shown = ", ".join(f"{name} {value:.4f}" for name, value in metrics.items() if not name.islower())
    return shown + "".join(f", {value:,} {name.replace('_', ' ')}" for name, value in counts.items())


def show_predictions(metrics: dict[str, float]) -> str:
    """The metrics of predictions in one line, with those that rows of one label do not have."""
    return show(metrics) + ("" if "NE" in metrics else ", AUC -, NE - (one label only)")
