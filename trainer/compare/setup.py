"""What the comparisons share before and between their runs: the log, popularity, silence of the stages."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from recpress.data.config import SampleConfig
from recpress.data.dataset.log import Log, open_log
from recpress.data.errors import InputError
from recpress.data.ingest import split as holdout
from recpress.data.synthetic import interactions as data_synth
from recpress.trainer.compare.config import CompareBothConfig, CompareCadcConfig
from recpress.trainer.compare.resume import check_same_comparison
from recpress.trainer.config import EvaluationConfig, NetworkConfig, TrainConfig, chosen_schema
from recpress.trainer.distributed.collectives import all_gather_arrays
from recpress.trainer.distributed.rank_errors import raise_on_all_ranks
from recpress.trainer.evaluate.ranking import vectors_from_factors
from recpress.trainer.evaluate.stage import load_heldout, rank_heldout
from recpress.trainer.observability.progress import comparisons

PerCase = dict[str, np.ndarray]
"""Metric -> its value for each held-out case, (cases,) float64; the same cases for all methods."""


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Discard standard output and log lines below warnings of the stages that a comparison runs; its own lines stay."""
    stages = logging.getLogger("recpress")
    levels = stages.level, comparisons.level
    comparisons.setLevel(comparisons.getEffectiveLevel())
    stages.setLevel(logging.WARNING)
    try:
        with open(os.devnull, "w", encoding="utf-8") as nowhere, contextlib.redirect_stdout(nowhere):
            yield
    finally:
        stages.setLevel(levels[0])
        comparisons.setLevel(levels[1])


def prepare_log(config: CompareCadcConfig | CompareBothConfig, folder: Path) -> tuple[str, Log]:
    """(path, log) to compare on; a synthetic log is written into `folder` if the config names none. Collective.

    Args:
        folder: of all runs; created if it does not exist.

    Raises:
        InputError: the log cannot be used, or has no held-out rows; the folder has runs of another comparison. On
            every rank.
    """
    path = config.data or str(folder / "log")
    with raise_on_all_ranks():
        if dist.get_rank() == 0:
            folder.mkdir(parents=True, exist_ok=True)
            if config.data is None and not Path(path).exists():
                data_synth.synth(config.synth, path)
    with raise_on_all_ranks():
        log = open_heldout(path, config)
        if dist.get_rank() == 0:
            check_same_comparison(config, folder, log)
    return path, log


def open_heldout(path: str, config: CompareCadcConfig | CompareBothConfig) -> Log:
    """The log. Raises InputError if it has no held-out rows."""
    log = open_log(path, chosen_schema(config.schema))
    if log.test is None and log.test_negatives is None:
        raise InputError(f"{path}: no held-out rows (test or test_negatives), which a comparison needs")
    return log


def split_validation(log: Log, path: str, seed: int, negatives: int) -> None:
    """Write a log to `path` that holds one random train row of each user out, to choose settings on. Collective."""
    with raise_on_all_ranks():
        if dist.get_rank() == 0 and not Path(path).exists():
            holdout.leave_one_out(log, path, by="random", seed=seed, negatives=negatives)


def gather_cases(cases: Mapping[str, torch.Tensor], metrics: Sequence[str]) -> PerCase:
    """Values of all ranks, in the order of the ranks, from those that `rank_heldout` gave each rank. Collective."""
    gathered = all_gather_arrays([cases[metric].double().numpy() for metric in metrics])
    return {metric: np.concatenate([of_rank[j] for of_rank in gathered]) for j, metric in enumerate(metrics)}


def rank_by_popularity(
    log: Log, evaluation: EvaluationConfig, per_case: dict[str, torch.Tensor] | None = None
) -> dict[str, float]:
    """Metrics of the items by their number of examples, the same for every user. Collective."""
    counts = torch.from_numpy(log.counts("item")).double()[:, None]
    return rank_heldout(
        load_heldout(log, evaluation),
        lambda users: torch.ones(len(users), 1),
        vectors_from_factors(counts),
        evaluation,
        torch.device("cpu"),
        per_case,
    )


def train_config(
    network: NetworkConfig, tables: dict[str, Any], seed: int, sample_rate: float, **settings: Any
) -> TrainConfig:
    """How one network of a comparison is trained: `tables` replaces settings of its tables, one seed for all draws."""
    fields = {name: getattr(network, name) for name in network.__dataclass_fields__}
    fields["model"] = replace(network.model, tables=replace(network.model.tables, **tables))
    fields["stream"] = replace(network.stream, seed=seed)
    fields["negatives"] = replace(network.negatives, seed=seed)
    sample = SampleConfig(rate=sample_rate, seed=seed)
    return TrainConfig(**fields, sample=sample, seed=seed, tensorboard=False, **settings)
