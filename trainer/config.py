"""Configuration of `recpress train`, with the parts that other stages share. Does not import torch, so that `--help` is
fast."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field, fields, replace
from typing import Annotated, Any, Literal, TypeVar, get_args

from recpress.data.config import NegativesConfig, SampleConfig, Schema, StreamConfig
from recpress.data.errors import InputError
from recpress.modules.config import HISTORY, LossConfig, TablesConfig, TowersConfig, TwoTowerConfig

try:
    from tyro.conf import arg
except ImportError:  # only the command line needs tyro
    _FOLLOW = None
else:
    _FOLLOW = arg(aliases=("--follow",))


def at_least(limit: float, **values: float | None) -> None:
    """Raise InputError if a value is below `limit` or NaN. None, a default that is not resolved yet, passes."""
    for name, value in values.items():
        if value is not None and (math.isnan(value) or value < limit):
            raise InputError(f"{name} is {value}, expected at least {limit}")


def chosen_schema(schema: Schema) -> Schema | None:
    """None for the default schema: the manifest of a log that recpress wrote then has its schema."""
    return None if schema == Schema() else schema


TableOptimizer = Literal["row-wise-adagrad", "adagrad", "sgd", "adam", "row-wise-adam", "lamb", "row-wise-lamb", "lars"]


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Adam or AdamW for the dense part; for trainable tables an optimizer that is fused into the backward pass."""

    dense: Literal["adam", "adamw"] = "adamw"
    """Optimizer of the towers."""
    tables: TableOptimizer = "row-wise-adagrad"
    """Optimizer of the trainable tables; on CPU `row-wise-adagrad`, `adagrad` or `sgd`. The default of
    `table_learning_rate` suits `row-wise-adagrad`."""
    learning_rate: float = 1e-3
    """Learning rate of the dense part."""
    weight_decay: float = 0.0
    """Decoupled with `adamw`, L2 with `adam`; dense part only."""
    table_learning_rate: float = 0.05
    """Learning rate of the trainable tables."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """After the warm-up: stay constant, or fall to zero at the last step. Applies to both learning rates."""
    warmup_steps: int = 0
    """Steps over which both learning rates rise linearly from zero."""
    clip_norm: float = 0.0
    """Maximum of the global gradient norm of the dense part; 0: no clipping."""

    def __post_init__(self) -> None:
        at_least(0, learning_rate=self.learning_rate, table_learning_rate=self.table_learning_rate)
        at_least(0, weight_decay=self.weight_decay, warmup_steps=self.warmup_steps, clip_norm=self.clip_norm)


RankingMetric = Literal["HR", "NDCG", "Recall", "UncappedRecall"]
"""Metrics with a cut-off."""


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """How to rank held-out rows."""

    protocol: Literal["auto", "sampled", "full"] = "auto"
    """`sampled`: against the negatives in the log; `full`: against all items, masking items that the user has seen;
    `auto`: `sampled` if the log has negatives."""
    k: tuple[int, ...] = (10,)
    """Cut-offs of HR@K, NDCG@K, Recall@K and UncappedRecall@K."""
    every: int | None = None
    """Epochs between evaluations on validation rows during training; by default 1, and 0 with --follow. If 0, with
    --evaluation.every-steps 0: no validation rows, no early stopping; the last weights are published."""
    every_steps: int = 0
    """Steps between further evaluations during training; 0: none."""
    metric: str = "NDCG@10"
    """Metric on the validation rows that chooses the epoch and stops training early: HR@K, NDCG@K, Recall@K,
    UncappedRecall@K, MRR or AUC."""
    patience: int = 3
    """Stop after this many evaluations without improvement; 0: run all epochs. The best epoch is published in either
    case."""
    validation: Literal["auto", "sample", "test"] = "auto"
    """Rows that choose the epoch. `auto`: the `val` part of the log, otherwise as `sample`; `sample`: a share of the
    sampled rows, which are excluded from training; `test`: the held-out part of the log, if that part is meant for
    validation (`recpress split`): its final metrics are then optimistic."""

    def __post_init__(self) -> None:
        at_least(0, every=self.every, every_steps=self.every_steps, patience=self.patience)
        if not re.fullmatch(rf"({'|'.join(get_args(RankingMetric))})@[1-9][0-9]*|MRR|AUC", self.metric):
            raise InputError(
                f"evaluation.metric is '{self.metric}', expected HR@K, NDCG@K, Recall@K or UncappedRecall@K, as in "
                "NDCG@10, or MRR or AUC"
            )
        if not self.k:
            raise InputError("evaluation.k: expected at least one cut-off")
        for k in self.k:
            at_least(1, k=k)

    @property
    def while_training(self) -> bool:
        """Whether to evaluate before the last step, and keep the best weights."""
        return self.every != 0 or self.every_steps > 0

    def during_training(self) -> EvaluationConfig:
        """The same, with the cut-off of `metric` added to `k`."""
        cutoff = self.metric.partition("@")[2]
        return replace(self, k=tuple(sorted({*self.k, int(cutoff)}))) if cutoff.isdecimal() else self

    def companion(self, full: bool) -> str:
        """The metric that must not fall when `metric` rises. `full`: all items are ranked."""
        name, _, cutoff = self.metric.partition("@")
        hits = "Recall" if full else "HR"
        return f"{hits if name == 'NDCG' else 'NDCG'}@{cutoff or self.k[0]}"


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When to save checkpoints, from which a run resumes after any stop."""

    steps: int = 0
    """Steps between checkpoints; 0: none by steps."""
    minutes: float = 10.0
    """Minutes between checkpoints; 0: not by the clock. With `steps` 0 too, only a signal (SIGTERM, SIGUSR1) saves
    one."""
    keep: int = 3
    """Number of checkpoints to keep, in addition to the weights of the best evaluation."""
    resume: bool = True
    """Resume from the newest complete checkpoint; otherwise remove all checkpoints and start over."""
    folder: str | None = None
    """Folder of the checkpoints, which all ranks see, or address of an object store (`s3://...`); by default --out plus
    `.checkpoints`. Removed once the model is written. Until then its `metrics` has the metrics of the run; with an
    object store they are on the disk of rank 0, with a copy in each checkpoint."""
    background: bool = True
    """Save in the background, from a copy of the state in host memory; otherwise training waits."""

    @property
    def while_training(self) -> bool:
        """Whether checkpoints are saved at intervals, not only on a signal."""
        return self.steps > 0 or self.minutes > 0

    def __post_init__(self) -> None:
        at_least(0, steps=self.steps, minutes=self.minutes)
        at_least(1, keep=self.keep)


@dataclass(frozen=True, kw_only=True)
class FollowConfig:
    """Online training on the files that are added to a log (docs/train/growing-log.md)."""

    online: Annotated[bool, _FOLLOW] = False
    """After the epochs on the files that exist at the start, train once on each new file. A signal ends the run with a
    checkpoint to resume from; --follow.idle-minutes ends it with a model."""
    seconds: float = 30.0
    """Seconds between two checks for new files."""
    idle_minutes: float = 0.0
    """Minutes without a new file after which the run ends; 0: never."""

    def __post_init__(self) -> None:
        at_least(0.01, seconds=self.seconds)
        at_least(0, idle_minutes=self.idle_minutes)


@dataclass(frozen=True, kw_only=True)
class WatchConfig:
    """Monitoring of a run from outside."""

    port: int = 0
    """Port of a Prometheus endpoint, http://ADDRESS:PORT/metrics, on the host of rank 0; 0: none."""
    address: str = "127.0.0.1"
    """Address of the endpoint. It has no password: use other addresses than loopback in trusted networks only."""

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise InputError(f"watch.port is {self.port}, expected 0 to 65535")


@dataclass(frozen=True, kw_only=True)
class WindowConfig:
    """TorchRec's metrics (NE, AUC, calibration, throughput) of the training examples."""

    window: int = 100_000
    """Number of the last examples, on all ranks together, that they are computed from; 0: no metrics."""

    def __post_init__(self) -> None:
        at_least(0, window=self.window)


@dataclass(frozen=True, kw_only=True)
class MetricsConfig(WindowConfig):
    """TorchRec's metrics (NE, AUC, calibration, throughput) of the training examples."""

    window: int = 100_000
    """Number of the last (user, item) pairs, on all ranks together, that they are computed from; 0: no metrics."""
    negatives: int = 4
    """Negatives of each row that are measured, weighted for the others; 0: all, which is slow if there are many."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(0, negatives=self.negatives)


@dataclass(frozen=True, kw_only=True)
class ProfileConfig:
    """A profile of some steps: traces of torch.profiler, and a table of the parts of a step."""

    steps: int = 0
    """Steps to profile; 0: none."""
    start: int = 20
    """Steps before them, since the start of this process, in which kernels and buffers are created."""

    def __post_init__(self) -> None:
        at_least(0, steps=self.steps, start=self.start)


@dataclass(frozen=True, kw_only=True)
class CommunicationConfig:
    """Precision in which vectors of embeddings and their gradients cross ranks. Rows and optimizers are fp32."""

    forward: Literal["fp32", "fp16", "bf16", "int8"] = "fp32"
    """Of vectors. int8: with a scale for each 32 numbers; tables that are sharded by rows send fp16, because ranks add
    their parts."""
    backward: Literal["fp32", "fp16", "bf16"] = "fp32"
    """Of their gradients."""


Precision = Literal["fp32", "tf32", "bf16", "fp16"]
Strategy = Literal["random", "warm-start", "frozen", "frozen+residual"]

# Frozen factors: towers start with the scores of the factors and can learn little. Trained factors: the same, with a
# low learning rate of the tables. Random tables: more to learn, at a constant rate, stopped when validation no longer
# improves. benchmarks/README.md says how the values were chosen.
_FROZEN: dict[str, Any] = {
    "batch_size": 2048,
    "dropout": 0.7,
    "penalty": 0.1,
    "learning_rate": 2e-3,
    "table_learning_rate": 0.05,
    "schedule": "cosine",
    "warmup_steps": 20,
    "epochs": 5,
}
_RANDOM = _FROZEN | {
    "batch_size": 1024,
    "dropout": 0.1,
    "penalty": 0.0,
    "learning_rate": 3e-3,
    "table_learning_rate": 0.2,
    "schedule": "constant",
    "warmup_steps": 0,
    "epochs": 40,
}
DEFAULTS: dict[Strategy, dict[str, Any]] = {
    "random": _RANDOM,
    "warm-start": _FROZEN | {"table_learning_rate": 0.01},
    "frozen": _FROZEN,
    "frozen+residual": _FROZEN,
}
"""Strategy -> values of the settings whose default depends on it."""


# The same sections, with settings whose default depends on the strategy. `network_for` returns plain sections.


@dataclass(frozen=True, kw_only=True)
class AutoTablesConfig(TablesConfig):
    """Initial values of the embedding tables, and whether to train them."""

    strategy: Literal["auto", "random", "warm-start", "frozen", "frozen+residual"] = "auto"  # type: ignore[assignment]
    """`auto`: `frozen` with --factors, else `random`. `random`: random, trained; `warm-start`: factors, trained;
    `frozen`: factors, frozen (CADC); `frozen+residual`: frozen factors plus a small trainable table."""


@dataclass(frozen=True, kw_only=True)
class AutoTowersConfig(TowersConfig):
    """The networks between the tables and the dot product."""

    dropout: float | None = None  # type: ignore[assignment]
    """Dropout on the hidden layers; by default 0.7, and 0.1 with random tables."""
    penalty: float | None = None  # type: ignore[assignment]
    """`residual`: weight in the loss of the mean square of the MLP's output, relative to the table's spread; by
    default 0.1, and 0 with random tables."""


@dataclass(frozen=True, kw_only=True)
class AutoStreamConfig(StreamConfig):
    """How to read the rows of a log into batches."""

    batch_size: int | None = None  # type: ignore[assignment]
    """Rows of a batch per rank; by default 2048, and 1024 with random tables."""


@dataclass(frozen=True, kw_only=True)
class AutoOptimizerConfig(OptimizerConfig):
    """Adam or AdamW for the dense part; for trainable tables an optimizer that is fused into the backward pass."""

    learning_rate: float | None = None  # type: ignore[assignment]
    """Learning rate of the dense part; by default 0.002, and 0.003 with random tables."""
    table_learning_rate: float | None = None  # type: ignore[assignment]
    """Learning rate of the trainable tables; by default 0.2, 0.05 with frozen factors, and 0.01 with
    `warm-start`."""
    schedule: Literal["constant", "linear", "cosine"] | None = None  # type: ignore[assignment]
    """After the warm-up: stay constant, or fall to zero at the last step of the last epoch. Applies to both learning
    rates. By default cosine; constant with random tables and with --follow."""
    warmup_steps: int | None = None  # type: ignore[assignment]
    """Steps over which both learning rates rise linearly from zero; by default 20, and 0 with random tables."""


@dataclass(frozen=True, kw_only=True)
class AutoSampleConfig(SampleConfig):
    """Random sample of the rows, with equal probability; a pure function of the seed and the log."""

    rate: float = 0.0
    """Share of the rows in the sample, in (0, 1]. 0, the default: with frozen factors, the sample that the cross-fitted
    factors have not seen, or 0.1 without such factors; otherwise all rows."""

    def __post_init__(self) -> None:
        if self.rate != 0.0:
            super().__post_init__()


_LOSS = LossConfig(kind="softmax", scale=8.0, candidates=100)


@dataclass(frozen=True, kw_only=True)
class NetworkConfig:
    """The network and its training, independent of the log.

    Defaults that depend on the strategy of the tables (`DEFAULTS`) are filled in by `network_for`.
    """

    stream: StreamConfig = field(default_factory=AutoStreamConfig)
    negatives: NegativesConfig = field(default_factory=lambda: NegativesConfig(count=512, shared=True))
    model: TwoTowerConfig = field(
        default_factory=lambda: TwoTowerConfig(
            tables=AutoTablesConfig(), towers=AutoTowersConfig(kind="residual", hidden=(256,)), loss=_LOSS
        )
    )
    optimizer: OptimizerConfig = field(default_factory=AutoOptimizerConfig)
    user_features: tuple[str, ...] = ()
    """Columns of `users.parquet` that join the user tower."""
    item_features: tuple[str, ...] = ()
    """Columns of `items.parquet` that join the item tower."""
    use_label: bool = False
    """Train on the label, a number in [0, 1]; otherwise every row is a positive."""
    epochs: int = 0
    """Maximum of passes over the rows; training stops early (--evaluation.patience). 0, the default: 5, and 40 with
    random tables."""

    def __post_init__(self) -> None:
        at_least(0, epochs=self.epochs)
        tables, towers = self.model.tables, self.model.towers
        widths = {"tables.dim": tables.dim, "tables.residual_dim": tables.residual_dim, "towers.dim": towers.dim}
        widths |= {"towers.feature_dim": towers.feature_dim, "tables.history_length": tables.history_length}
        widths |= {"towers.hidden": min(towers.hidden)} if towers.hidden else {}
        at_least(1, **{f"model.{name}": width for name, width in widths.items()})
        at_least(0, **{"model.towers.dropout": towers.dropout, "model.towers.penalty": towers.penalty})
        if towers.dropout is not None and towers.dropout >= 1:
            raise InputError(f"model.towers.dropout is {towers.dropout}, expected a number in [0, 1)")


Network = TypeVar("Network", bound=NetworkConfig)
Section = TypeVar("Section")


def network_for(strategy: Strategy, network: Network) -> Network:
    """The network with tables of this strategy, and defaults filled in."""
    defaults, model = DEFAULTS[strategy], network.model
    return replace(
        network,
        stream=_filled(StreamConfig, network.stream, defaults),
        model=replace(
            model,
            tables=_filled(TablesConfig, replace(model.tables, strategy=strategy), defaults),
            towers=_filled(TowersConfig, model.towers, defaults),
        ),
        optimizer=_filled(OptimizerConfig, network.optimizer, defaults),
        epochs=network.epochs or defaults["epochs"],
    )


def _filled(kind: type[Section], section: Section, defaults: dict[str, Any]) -> Section:
    """A plain section, with defaults for values that are None."""
    values = {part.name: getattr(section, part.name) for part in fields(kind)}  # type: ignore[arg-type]
    return kind(
        **{name: defaults[name] if value is None and name in defaults else value for name, value in values.items()}
    )


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What a training run of any model has."""

    data: str
    """The log: a folder, file or glob."""
    out: str
    """Folder of the model and the metrics; must not exist unless --overwrite."""
    schema: Schema = field(default_factory=Schema)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    watch: WatchConfig = field(default_factory=WatchConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    stall_seconds: float = 600.0
    """Time limit of a step, and of a rank without a heartbeat. A longer stall ends the run and names the rank."""
    precision: Precision = "fp32"
    """Precision of the dense part while it trains. `tf32`: TF32 for float32 products, on CUDA only; `bf16`, `fp16`:
    autocast, fp16 with a gradient scale. Weights, tables, losses and evaluations are fp32."""
    communication: CommunicationConfig = field(default_factory=CommunicationConfig)
    accumulate: int = 1
    """Batches per step of the dense part, which applies the mean of their gradients. Trained tables are updated with
    every batch. All counts of steps are of such steps."""
    ema: float | None = None
    """Decay per step of an exponential moving average of the dense weights, as in 0.999. Evaluations and the published
    model have the average; by default there is none."""
    stop_after: int = 0
    """Stop after this many epochs, with the schedule of all epochs; 0: after the last."""
    warm_start: str | None = None
    """Folder of an earlier model, or of checkpoints, whose dense parameters and embedding rows (by id) are the initial
    weights."""
    warm_start_names: tuple[str, ...] = ()
    """NEW=OLD: a table, a parameter, or the start of the names of parameters of this model, and its name in the earlier
    model. NEW= omits it."""
    seed: int = 0
    """Seed of the network's initial weights."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device of training. The backend is gloo on CPU and nccl on CUDA."""
    tensorboard: bool = True
    """Write TensorBoard scalars in addition to JSON lines."""
    overwrite: bool = False
    """Replace an existing --out."""

    def __post_init__(self) -> None:
        at_least(1, accumulate=self.accumulate)
        if self.ema is not None and not 0 < self.ema < 1:
            raise InputError(f"ema is {self.ema}, expected a number in (0, 1), such as 0.999")
        if self.warm_start_names and self.warm_start is None:
            raise InputError("warm_start_names: given without --warm-start, the earlier model")
        if len(self.warm_start_pairs) < len(self.warm_start_names):
            raise InputError(f"warm_start_names: {' '.join(self.warm_start_names)} names a parameter twice")

    @property
    def warm_start_pairs(self) -> dict[str, str]:
        """New name -> earlier name, or "" to omit it. Raises InputError if one is not NEW=OLD."""
        pairs = {}
        for text in self.warm_start_names:
            new, equals, old = text.partition("=")
            if not equals or not new:
                raise InputError(f"warm_start_names: '{text}', expected NEW=OLD, or NEW= to omit it")
            pairs[new] = old
        return pairs

    def total_steps(self, batches_per_epoch: int, epochs: int) -> int:
        """Steps of the dense part in all epochs. Each epoch ends with a step of the batches that are left."""
        return -(-batches_per_epoch // self.accumulate) * epochs


@dataclass(frozen=True, kw_only=True)
class TrainConfig(NetworkConfig, RunConfig):
    """Train the two-tower network on a log: on all rows, or, with frozen factors, on a random sample."""

    factors: str | None = None
    """Folder of factors, the initial values of the tables; without factors, tables are random."""
    hash: str | None = None
    """Folder of `recpress hash`: its id maps compress the tables of users and items, frozen and trained ones."""
    crossfit: Literal["auto", "yes", "no"] = "auto"
    """Train on the factors that have not seen the sample, then replace them by those of all rows. `auto`: if the tables
    are frozen and there are such factors for this sample."""
    sample: SampleConfig = field(default_factory=AutoSampleConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    follow: FollowConfig = field(default_factory=FollowConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """A loss that is NaN or infinite: `stop` ends the run and names the step; `skip` skips its batch and counts it."""

    def __post_init__(self) -> None:
        NetworkConfig.__post_init__(self)
        RunConfig.__post_init__(self)
        if self.follow.online and self.optimizer.schedule not in ("constant", None):
            raise InputError(
                f"optimizer.schedule is '{self.optimizer.schedule}', which falls to zero at the last step, and "
                "online training has no last step; expected constant"
            )
        history = self.model.tables.history
        if history != "none" and (self.follow.online or self.hash):
            raise InputError(
                f"model.tables.history is '{history}', expected none with {'hash' if self.hash else 'follow'}"
            )
        if history != "none" and HISTORY in self.user_features:
            raise InputError(f"user_features: '{HISTORY}' is the key of the items of users; rename the column")
        if history == "only" and self.model.tables.strategy == "frozen+residual":
            raise InputError("model.tables.history is 'only': frozen+residual adds to rows of users; expected frozen")
        if self.follow.online and self.stop_after:
            raise InputError("stop_after: expected 0 with follow, which continues after the last epoch")

    def resolved(self) -> TrainConfig:
        """The configuration with all defaults but that of --sample.rate, which needs the factors (`choose_sample`)."""
        strategy: Any = self.model.tables.strategy
        if strategy == "auto":
            strategy = "random" if self.factors is None else "frozen"
        config = self
        if self.follow.online:  # no last step for a schedule, and no end to choose an epoch at
            every = 0 if self.evaluation.every is None else self.evaluation.every
            schedule = self.optimizer.schedule or "constant"
            config = replace(
                config,
                evaluation=replace(self.evaluation, every=every),
                optimizer=replace(self.optimizer, schedule=schedule),
            )
        elif self.evaluation.every is None:
            config = replace(config, evaluation=replace(self.evaluation, every=1))
        return network_for(strategy, config)
