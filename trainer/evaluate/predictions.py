"""`recpress evaluate` of a model of labels: AUC, NE, log loss and calibration of the held-out parts of a log."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from recpress.data.dataset.log import Log
from recpress.data.dataset.parquet_split import ParquetSplit, largest_id
from recpress.data.errors import InputError
from recpress.trainer.artifacts.factors import check_vocabulary
from recpress.trainer.config import EvaluationConfig, chosen_schema
from recpress.trainer.distributed.process_group import Ranks
from recpress.trainer.distributed.rank_errors import raise_on_all_ranks
from recpress.trainer.evaluate.config import PARTS, EvaluateConfig, Part
from recpress.trainer.evaluate.labelled import evaluate_rows, part_rows
from recpress.trainer.features.batches import FeatureBatches
from recpress.trainer.features.feature_set import FeatureSet
from recpress.trainer.features.resolve import open_with_features
from recpress.trainer.features.saved import check_ids, saved_configs, saved_schema
from recpress.trainer.model.saved import load_labelled, saved_options


def evaluate_labelled(config: EvaluateConfig, manifest: dict[str, Any], ranks: Ranks) -> dict[str, dict[str, float]]:
    """Part of the log -> metrics of its rows, as `recpress train` reports them. Collective.

    Args:
        manifest: of `config.model`.

    Raises:
        InputError: the log has no held-out rows with labels, or does not fit the model. On every rank.
    """
    path, given = config.model, {}
    with raise_on_all_ranks():
        if config.evaluation != EvaluationConfig():
            raise InputError(f"evaluation.*: options of a ranking, but {path} predicts labels; expected none of them")
        saved_options(path, manifest, config.factory)
        given = {feature.name: feature.config for feature in saved_configs(path, manifest)}
    schema = chosen_schema(config.schema) or chosen_schema(saved_schema(manifest))
    log = open_with_features(config.data, schema, given, skip=False)
    rows: dict[Part, ParquetSplit] = {}
    with raise_on_all_ranks():
        if not log.schema.label:
            raise InputError(f"{log.path}: no label; expected --schema.label, a column of 0 and 1, or of ratings")
        check_vocabulary(path, manifest, log)
        rows = _parts(log, config.parts, log.schema.label)
    saved, label = manifest["config"], str(log.schema.label)
    size = int(saved["stream"]["batch_size"])  # predictions have the bits of those of `train`
    model, features = load_labelled(path, manifest, log, ranks, factory=config.factory, batch_size=size)
    columns = [label, *features.columns(log)]
    with raise_on_all_ranks():
        for part, split in rows.items():
            _check(path, features, log, part, split, columns)
    builder = FeatureBatches(features, log, label, saved["label_threshold"])
    return {
        part: evaluate_rows(model.dmp, part_rows(split, columns, ranks), builder, ranks, size)
        for part, split in rows.items()
    }


def _parts(log: Log, chosen: Sequence[Part], label: str) -> dict[Part, ParquetSplit]:
    """The parts to measure. Raises InputError if there are none, or a chosen one lacks labels."""
    known: dict[Part, ParquetSplit | None] = {"test": log.test, "val": log.val}
    held = {part: rows for part in PARTS if (rows := known[part]) is not None}
    for part in chosen:
        if part not in held:
            raise InputError(f"{log.path}: no {part} part; it has {', '.join(held) or 'train only'}")
    if not held:
        raise InputError(
            f"{log.path}: no held-out rows; expected test.parquet or val.parquet with a column '{label}' "
            "(`recpress ingest --holdout`)"
        )
    labelled = {part: rows for part, rows in held.items() if label in rows.columns}
    if missing := [part for part in chosen or () if part not in labelled]:
        raise InputError(f"{log.path}: its {missing[0]} part has no column '{label}', the label")
    if not labelled:
        raise InputError(f"{log.path}: its {' and '.join(held)} part has no column '{label}', the label")
    return {part: rows for part, rows in labelled.items() if part in (chosen or labelled)}


def _check(path: str, features: FeatureSet, log: Log, part: str, rows: ParquetSplit, columns: Sequence[str]) -> None:
    """Raise InputError if a part lacks a column, or has ids that the model has no row for."""
    if missing := [name for name in columns if name not in rows.columns]:
        raise InputError(f"{log.path}: its {part} part has no column '{missing[0]}', which {path} reads")
    for feature in features.features:
        if feature.source == "log" and feature.kind in ("id", "list", "sequence"):
            check_ids(path, features, feature, largest_id(rows, feature.column)[0], f"{log.path}, {part}")
