"""`recpress train`: log and factors -> a two-tower network, trained on a sample of the rows."""

from __future__ import annotations

import logging
import shutil
import time
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from recpress.data.stream.loader import InteractionStream
from recpress.trainer.allocator import malloc_trim
from recpress.trainer.artifacts.factors import MODEL, FactorsArtifact, claimed, shared_artifact
from recpress.trainer.artifacts.id_maps import save_maps
from recpress.trainer.checkpoint.checkpoints import Checkpoints
from recpress.trainer.config import TrainConfig
from recpress.trainer.distributed.collectives import all_reduce
from recpress.trainer.distributed.process_group import Ranks, process_group
from recpress.trainer.distributed.rank_errors import assert_same_across_ranks, raise_on_all_ranks
from recpress.trainer.errors import same_command_resumes
from recpress.trainer.evaluate.stage import load_heldout, show
from recpress.trainer.loop.config import FitConfig, FitResult
from recpress.trainer.loop.optimizer import TrainOptimizer
from recpress.trainer.loop.precision import check_precision
from recpress.trainer.loop.training_data import TrainingData
from recpress.trainer.model.table_optimizers import check_table_optimizer
from recpress.trainer.model.two_tower import MAPS, WEIGHTS, ShardedTwoTower
from recpress.trainer.model.weights import save_weights
from recpress.trainer.train.choice import Choice
from recpress.trainer.train.data import make_batches, make_stream, training_data
from recpress.trainer.train.inputs import Inputs, has_heldout, open_inputs
from recpress.trainer.train.networks import Networks
from recpress.trainer.train.outcome import choose_published, rank_test
from recpress.trainer.train.resume import checkpoint_folder, digest, keep_global_batch, open_checkpoints
from recpress.trainer.train.run import run_fit
from recpress.trainer.train.validation import NoRows, ValidationRows, load_validation
from recpress.trainer.train.warm_start import warm_start

if TYPE_CHECKING:
    from recpress.trainer.observability.rec_metrics import RecMetrics
    from recpress.trainer.train.config import TrainModelConfig

logger = logging.getLogger(__name__)


@dataclass
class TrainResult:
    """What a training run did."""

    fit: FitResult
    metrics: dict[str, float]
    """Of the held-out rows, at the end; empty if the log has none."""
    rows: int
    """Rows that were trained on, on all ranks, without validation rows."""
    setup_seconds: float
    """Opening, planning, sharding, loading factors."""
    table_bytes: int
    """Of all embedding tables as stored: with scales, without optimizer states."""
    map_bytes: int
    """Of the id maps, bit-packed; 0 without maps, and for maps that a formula computes."""
    factorization: dict[str, float] = field(default_factory=dict)
    """Metrics of the factors' own ranking of the same held-out rows; empty without factors."""
    cases: dict[str, torch.Tensor] = field(default_factory=dict, repr=False)
    """Each of `metrics` per held-out case of this rank, float64."""
    validation: dict[str, Any] = field(default_factory=dict)
    """How the epoch was chosen (`Choice.describe`); empty if it was not."""
    best_epoch: int | None = None
    """The epoch whose weights were published; 0: those before the first step; None: no epoch was chosen."""
    fallback: bool = False
    """Whether the factorization's own ranking was published, because no epoch was better."""


def train_any(config: TrainConfig | TrainModelConfig) -> None:
    """`recpress train`: the two-tower network (`train`), or another model (`model_stage.train_model`)."""
    if isinstance(config, TrainConfig):
        train(config)
        return
    from recpress.trainer.train.model_stage import train_model

    train_model(config)


def train(config: TrainConfig) -> TrainResult:
    """Train on `config.sample` of the log and write the model to `config.out`.

    With factors, the published model never ranks the validation rows worse than they do: if no epoch is better than
    the factorization, the factorization's own ranking is published. During the run, checkpoints and metrics are in
    folders next to `out`; a run with the same `out` resumes from them.

    Raises:
        InputError: log, factors or settings cannot be used; a loss is not finite; `out` exists. On every rank;
            nothing is written but checkpoints.
        Preempted: a signal stopped the run, after a checkpoint.
    """
    with (
        process_group(config.device, config.stall_seconds) as ranks,
        claimed(config.out, checkpoint_folder(config)),
        same_command_resumes(),
    ):
        return _train(config, ranks)


def _train(config: TrainConfig, ranks: Ranks) -> TrainResult:
    """`train` within its process group, which must outlive the model: see `process_group`."""
    start = time.monotonic()
    assert_same_across_ranks(configuration=digest(asdict(config.resolved())))
    with raise_on_all_ranks():
        check_precision(config.precision, ranks.device)
        check_table_optimizer(config.optimizer.tables, ranks.device.type)
    inputs = open_inputs(config, ranks)
    config, log, factors, maps = inputs.config, inputs.log, inputs.factors, inputs.maps
    artifacts = {"factors": config.factors, "hash": config.hash}
    with open_checkpoints(config, log, inputs.stream.global_batch, artifacts) as checkpoints:
        hold_out = inputs.stream.hold_out
        stream = keep_global_batch(
            inputs.stream, checkpoints, ranks, lambda rows: make_stream(config, log, ranks, rows, hold_out)
        )
        with raise_on_all_ranks():
            data = training_data(config, log, stream, ranks, maps)
        networks = Networks(inputs, ranks)
        model = networks.build(config.model)
        heldout = load_heldout(log, config.evaluation) if has_heldout(config, log, ranks) else None
        validation = load_validation(config, log, stream.hold_out, ranks, count_items=factors is None)
        unproven = isinstance(validation, NoRows) and inputs.starts_as_factors
        malloc_trim()  # what reading the pairs used, before the tables are filled
        networks.load_factors(model, crossfit=inputs.crossfit)
        malloc_trim()
        checkpoints.describe["ids"] = inputs.describe()["ids"]  # a later run may start from a checkpoint, too
        # Before `fit` loads a checkpoint, so that a resumed run compares with the same start.
        choice = _prepare_choice(networks, model, validation) if isinstance(validation, ValidationRows) else None
        if isinstance(validation, NoRows) and ranks.rank == 0:
            _warn_no_validation(config, validation, unproven)
        if config.warm_start is not None and checkpoints.start is None:
            warm_start(config, model.dmp, log, inputs.tables())
        setup_seconds = time.monotonic() - start

        nothing_to_prove = unproven or (choice is not None and choice.seen)
        fitted = _fit(inputs, model, data, stream, choice, checkpoints, ranks, no_steps=nothing_to_prove)

        if inputs.crossfit:
            networks.load_factors(model, crossfit=False)
        published = choose_published(choice, fitted, warm_started=config.warm_start is not None)
        if unproven:
            published |= {"best_epoch": 0, "fallback": True}
        manifest = inputs.describe()
        if published["fallback"] and (config.model.towers.kind != "residual" or config.warm_start is not None):
            model = networks.like_factorization(crossfit=False)
            manifest["model"]["two_tower"] = asdict(networks.residual())
        model.dmp.eval()
        if stream.hold_out is not None:
            with raise_on_all_ranks():
                model.builder.replace_users(inputs.features.with_histories(log, config.model.tables).user)
        metrics, factorization, cases = rank_test(inputs, model, heldout, ranks)

        table_bytes, map_bytes = sum(model.module.table_bytes.values()), sum(m.nbytes for m in maps.values())
        kept_positives = int(all_reduce(torch.tensor(model.builder.negatives.kept_positives)))
        manifest |= {
            "rows": data.num_rows,
            **data.describe(),
            "rejects_positives": model.builder.negatives.reject is not None,
            "kept_positives": kept_positives,
            "steps": fitted.steps,
            "skipped": fitted.skipped,
            "best": fitted.best,
            "evaluations": fitted.evaluations,
            **published,
            "metrics": metrics,
            "factorization_metrics": factorization,
            "table_bytes": table_bytes,
            "tables": model.module.table_bytes,
            "map_bytes": map_bytes,
            "seconds": {"setup": setup_seconds, "train": fitted.train_seconds},
        }
        with shared_artifact(config.out, MODEL, manifest, overwrite=config.overwrite) as folder:
            (folder / WEIGHTS).mkdir(exist_ok=True)
            save_weights(model.dmp, folder / WEIGHTS)
            with raise_on_all_ranks():
                if ranks.rank == 0:
                    if maps:
                        save_maps(maps, folder / MAPS)
                    shutil.copytree(checkpoints.metrics, folder, dirs_exist_ok=True)
        checkpoints.finish()
    if ranks.rank == 0:
        if kept_positives:
            logger.info(f"{kept_positives:,} negatives were positives of their user, who has nearly all items")
        shown = show(metrics) or "no held-out rows"
        print(f"{config.out}: {fitted.steps} steps in {fitted.train_seconds:.1f} s; {shown}")
        each = ", ".join(f"{name} {size:,}" for name, size in model.module.table_bytes.items())
        print(f"tables {table_bytes:,} bytes ({each})" + (f", maps {map_bytes:,} bytes" if maps else ""))
    return TrainResult(
        fitted,
        metrics,
        data.num_rows,
        setup_seconds,
        table_bytes,
        map_bytes,
        factorization=factorization,
        cases=cases,
        **published,
    )


def _prepare_choice(networks: Networks, model: ShardedTwoTower, validation: ValidationRows) -> Choice:
    """Rank the validation rows by the factorization, which a network must beat, and by popularity. Collective."""
    inputs, ranks = networks.inputs, networks.ranks
    choice = Choice(validation.heldout, inputs.config.evaluation, ranks, validation.weights)
    if inputs.starts_as_factors:
        residual = inputs.config.model.towers.kind == "residual"
        start = model if residual else networks.like_factorization(crossfit=inputs.crossfit)
        start.dmp.eval()
        choice.set_start(start.vectors("user"), start.vectors("item"))
        choice.seen = validation.source == "sample" and not inputs.crossfit
        if choice.seen and ranks.rank == 0:
            logger.warning(
                "the factors have seen the validation rows, so that no network can be shown to be better: trains none "
                "and keeps the factorization's ranking. For a network, make factors with recpress factorize "
                "--crossfit-rate, or give the log a val part; --evaluation.every 0 trains without validation"
            )
    choice.set_popularity(_item_counts(inputs.factors, validation, inputs.crossfit))
    return choice


def _item_counts(factors: FactorsArtifact | None, validation: ValidationRows, crossfit: bool) -> torch.Tensor:
    """Rows of each item, (items, 1) float64, without validation rows if that is known."""
    if validation.item_counts is not None:
        return torch.from_numpy(validation.item_counts).double()[:, None]
    assert factors is not None
    with raise_on_all_ranks():
        return torch.from_numpy(factors.counts("item", crossfit=crossfit)[:]).double()


def _warn_no_validation(config: TrainConfig, found: NoRows, unproven: bool) -> None:
    effect = f"training for all {config.epochs} epochs, without a choice"
    if unproven:
        effect = "so that no network can be shown to be better: trains none and keeps the factorization's ranking"
    logger.warning(
        f"{found.why}; {effect}. A larger --sample.rate or val part gives validation rows, and --evaluation.every 0 "
        "trains without"
    )


def _fit(
    inputs: Inputs,
    model: ShardedTwoTower,
    data: TrainingData,
    stream: InteractionStream,
    choice: Choice | None,
    checkpoints: Checkpoints,
    ranks: Ranks,
    *,
    no_steps: bool,
) -> FitResult:
    """Train the model, with metrics, profile and endpoint as configured."""
    config = inputs.config
    residual = config.model.towers.kind == "residual"
    # With residual towers and before any step, the model ranks as the factorization does, which is already ranked.
    at_start = choice is not None and choice.start is not None and residual and checkpoints.start is None
    at_start = at_start and config.warm_start is None

    def evaluate() -> dict[str, float]:
        nonlocal at_start
        assert choice is not None
        if at_start:
            at_start = False
            return choice.evaluate_start()
        model.dmp.eval()
        return choice.evaluate(model.vectors("user"), model.vectors("item"))

    total_steps = 0 if config.follow.online else config.total_steps(stream.steps_per_epoch, config.epochs)
    evaluation = config.evaluation
    return run_fit(
        config,
        model.dmp,
        TrainOptimizer(model.dmp, config.optimizer, total_steps, ema=config.ema),
        lambda epoch, step: make_batches(data.stream_of(epoch), model, epoch, step),
        FitConfig(
            epochs=0 if no_steps else min(config.stop_after or config.epochs, config.epochs),
            accumulate=config.accumulate,
            precision=config.precision,
            evaluate_every=evaluation.every or 0,
            evaluate_steps=evaluation.every_steps,
            evaluate_first=evaluation.while_training,
            metric=evaluation.metric,
            patience=evaluation.patience,
            on_nonfinite=config.on_nonfinite,
            keep_best=evaluation.while_training,
        ),
        checkpoints=checkpoints,
        ranks=ranks,
        data=data,
        evaluate=evaluate if choice is not None else None,
        accept=choice.accepts if choice is not None else None,
        metrics=_rec_metrics(config, model, stream, ranks),
    )


def _rec_metrics(
    config: TrainConfig, model: ShardedTwoTower, stream: InteractionStream, ranks: Ranks
) -> RecMetrics | None:
    if not config.metrics.window:
        return None
    from recpress.trainer.observability.rec_metrics import RecMetrics  # slow to import: torchmetrics

    return RecMetrics(config.metrics, model.module.loss, rows=stream.global_batch, device=ranks.device)
