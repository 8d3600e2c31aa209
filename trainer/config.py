"""Configuration of `recpress train`, part by part, and what other stages have of it. Free of torch: `--help` answers at
once."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Annotated, Literal

from recpress.data.config import (
    NegativesConfig,
    SampleConfig,
    Schema,
    StreamConfig,
)
from recpress.data.errors import InputError
from recpress.modules.config import (
    LossConfig,
    TowersConfig,
    TwoTowerConfig,
)

try:
    from tyro.conf import arg
except ImportError:  # only the command line needs it, and a GPU machine without a network may lack it
    _FOLLOW = None
else:
    _FOLLOW = arg(aliases=("--follow",))


def at_least(limit: float, **values: float) -> None:
    """Raise InputError where a value is below `limit` or no number."""
    for name, value in values.items():
        if math.isnan(value) or value < limit:
            raise InputError(f"{name} is {value}, expected at least {limit}")


def chosen_schema(schema: Schema) -> Schema | None:
    """None where nothing was chosen: then a log that was written by us says itself what its columns mean."""
    return None if schema == Schema() else schema


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Fused row-wise Adagrad for trainable tables; Adam or AdamW for the dense part."""

    dense: Literal["adam", "adamw"] = "adamw"
    """Optimizer of the towers."""
    learning_rate: float = 1e-3
    """Of the dense part."""
    weight_decay: float = 0.0
    """Decoupled with `adamw`, L2 with `adam`; dense part only."""
    table_learning_rate: float = 0.05
    """Of the fused row-wise Adagrad of the trainable tables."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """After the warm-up: stay, or fall to zero at the last step. Holds for both learning rates."""
    warmup_steps: int = 0
    """Steps over which both learning rates rise linearly from zero."""
    clip_norm: float = 0.0
    """Bound of the global gradient norm of the dense part; 0 clips nothing."""

    def __post_init__(self) -> None:
        at_least(0, learning_rate=self.learning_rate, table_learning_rate=self.table_learning_rate)
        at_least(0, weight_decay=self.weight_decay, warmup_steps=self.warmup_steps, clip_norm=self.clip_norm)


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """How held-out rows are ranked."""

    protocol: Literal["auto", "sampled", "full"] = "auto"
    """`sampled`: against the given negatives; `full`: against all items, seen ones masked;
    `auto`: what the log has."""
    k: tuple[int, ...] = (10,)
    """Cut-offs of HR@K, NDCG@K and Recall@K."""
    every: int = 0
    """Epochs between evaluations while training; with --evaluation.every-steps 0 too, only the end is evaluated."""
    every_steps: int = 0
    """Steps between evaluations while training, besides those by epochs; 0: none."""
    metric: str = "NDCG@10"
    """What early stopping and the best checkpoint go by."""
    patience: int = 0
    """Stop after so many evaluations without a better one and keep the best weights; 0 runs all epochs."""

    def __post_init__(self) -> None:
        at_least(0, every=self.every, every_steps=self.every_steps, patience=self.patience)
        if not self.k:
            raise InputError("evaluation.k: expected at least one cut-off")
        for k in self.k:
            at_least(1, k=k)
        if self.patience and not self.while_training:
            raise InputError(
                "evaluation.patience: expected evaluation.every, the epochs between evaluations, or "
                "evaluation.every_steps, the steps"
            )

    @property
    def while_training(self) -> bool:
        """Whether there are evaluations before the last step: the best weights are kept then."""
        return self.every > 0 or self.every_steps > 0


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When the state of a run is written, so that it can go on after whatever stops it."""

    steps: int = 0
    """Steps between checkpoints; 0: not by steps."""
    minutes: float = 10.0
    """Minutes between checkpoints; 0: not by the clock. With `steps` 0 too, only a signal (SIGTERM, SIGUSR1) writes
    one."""
    keep: int = 3
    """The last so many are kept, and the weights of the best evaluation."""
    resume: bool = True
    """Go on from the newest whole checkpoint; otherwise remove what is there and start anew."""
    folder: str | None = None
    """Where they lie: a folder of a disk that all ranks see, or of an object store (`s3://...`); by default --out with
    `.checkpoints` after it. Removed once the model is written. The metrics of the run are in its `metrics` while it
    runs; with a store, on the disk of rank 0, and a copy in each checkpoint."""
    background: bool = True
    """Write beside training, from a copy in host memory of what training changes; otherwise training waits."""

    def __post_init__(self) -> None:
        at_least(0, steps=self.steps, minutes=self.minutes)
        at_least(1, keep=self.keep)


@dataclass(frozen=True, kw_only=True)
class FollowConfig:
    """Training that goes on with the files that come to a log (docs/log.md)."""

    on: Annotated[bool, _FOLLOW] = False
    """After the epochs of the files that are there at the start, train once on each file that comes to the log. A
    signal ends it, with a checkpoint to go on from, or --follow.idle-minutes, with a model."""
    seconds: float = 30.0
    """Seconds between two looks for new files."""
    idle_minutes: float = 0.0
    """Minutes without a new file after which the run ends; 0: never."""

    def __post_init__(self) -> None:
        at_least(0.01, seconds=self.seconds)
        at_least(0, idle_minutes=self.idle_minutes)


@dataclass(frozen=True, kw_only=True)
class WatchConfig:
    """What shows a run from outside while it goes on."""

    port: int = 0
    """Port of a Prometheus text endpoint, http://ADDRESS:PORT/metrics, on the host of rank 0; 0: none."""
    address: str = "127.0.0.1"
    """Where it listens. It has no password: other addresses than loopback are for trusted networks only."""

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise InputError(f"watch.port is {self.port}, expected 0 to 65535")


@dataclass(frozen=True, kw_only=True)
class MetricsConfig:
    """TorchRec's metrics (NE, AUC, calibration, throughput) of the rows that are trained on."""

    window: int = 100_000
    """They are of the last so many pairs of user and item, all ranks together; 0: no such metrics."""
    negatives: int = 4
    """Negatives of each row that are measured, with weights that make up for the others; 0: all, which is slow with
    many."""

    def __post_init__(self) -> None:
        at_least(0, window=self.window, negatives=self.negatives)


@dataclass(frozen=True, kw_only=True)
class ProfileConfig:
    """A trace and a table of where the time of some steps goes (torch.profiler)."""

    steps: int = 0
    """Steps to profile; 0: none."""
    start: int = 20
    """Steps of this start of the run before them, in which kernels and buffers are made."""

    def __post_init__(self) -> None:
        at_least(0, steps=self.steps, start=self.start)


_LOSS = LossConfig(kind="softmax", scale=8.0, candidates=100)
_TOWERS = TowersConfig(kind="residual", hidden=(256,), dropout=0.7, penalty=0.1)


@dataclass(frozen=True, kw_only=True)
class NetworkConfig:
    """The network and how it is trained, whatever the log.

    The defaults are for frozen factors: towers that start with the factors' own scores and can learn little, many
    negatives that the rows of a batch share, few epochs (benchmarks/README.md says how they were chosen).
    """

    stream: StreamConfig = field(default_factory=lambda: StreamConfig(batch_size=2048))
    negatives: NegativesConfig = field(default_factory=lambda: NegativesConfig(count=512, shared=True))
    model: TwoTowerConfig = field(default_factory=lambda: TwoTowerConfig(towers=_TOWERS, loss=_LOSS))
    optimizer: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig(learning_rate=2e-3, schedule="cosine", warmup_steps=20)
    )
    user_features: tuple[str, ...] = ()
    """Columns of `users.parquet` that join the user tower."""
    item_features: tuple[str, ...] = ()
    """Columns of `items.parquet` that join the item tower."""
    use_label: bool = False
    """Train on the label, a number in [0, 1]; otherwise every row is a positive."""
    epochs: int = 3
    """Passes over the rows, at most."""

    def __post_init__(self) -> None:
        at_least(1, epochs=self.epochs)


@dataclass(frozen=True, kw_only=True)
class TrainConfig(NetworkConfig):
    """Train the two-tower network on a random sample of a log."""

    data: str
    """The log: a folder, file or glob."""
    out: str
    """Folder of the model and the metrics; must not exist unless --overwrite."""
    factors: str | None = None
    """Folder of factors, for every strategy but `random`."""
    hash: str | None = None
    """Folder of `recpress hash`: its maps compress the tables of users and items. Frozen rows are shared, and rows
    that are trained are those that the ids share."""
    crossfit: Literal["auto", "yes", "no"] = "auto"
    """Train on the factors that have not seen the sample, then put those of all rows in their place; `auto`: where
    the tables are frozen and there are such factors for this very sample."""
    schema: Schema = field(default_factory=Schema)
    sample: SampleConfig = field(default_factory=lambda: SampleConfig(rate=0.1))
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    follow: FollowConfig = field(default_factory=FollowConfig)
    watch: WatchConfig = field(default_factory=WatchConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    stall_seconds: float = 600.0
    """A step, or a collective outside of steps, that takes longer ends the run, with the rank that stalls named."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """A loss that is NaN or infinite: `stop` ends the run with its step; `skip` leaves its batch out, and counts it."""
    stop_after: int = 0
    """Stop after so many epochs of a schedule that is made for all of them; 0 stops at the last."""
    seed: int = 0
    """Seed of the network's initial weights."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the network is trained; the backend is gloo on CPU and nccl on CUDA."""
    tensorboard: bool = True
    """Write TensorBoard scalars beside the JSON lines."""
    overwrite: bool = False
    """Replace an existing --out."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.follow.on and self.optimizer.schedule != "constant":
            raise InputError(
                f"optimizer.schedule is '{self.optimizer.schedule}', which falls to zero at the last step, and a log "
                "that is followed has none; expected constant"
            )
        if self.follow.on and self.stop_after:
            raise InputError("stop_after: expected 0 with follow, which goes on after the last epoch")
