"""Configuration of the stages: one dataclass a subcommand. Free of torch: `--help` answers at once."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Annotated, Literal

from recpress.data.config import (
    IngestConfig,
    LayoutConfig,
    NegativesConfig,
    SampleConfig,
    Schema,
    StreamConfig,
    SynthConfig,
    SynthCriteoConfig,
)
from recpress.data.errors import InputError
from recpress.modules.config import (
    ALSConfig,
    HashConfig,
    LogisticConfig,
    LossConfig,
    TablesConfig,
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


@dataclass(frozen=True, kw_only=True)
class SplitConfig:
    """Hold one row of each user out of a log, e.g. to choose settings without a look at the test rows."""

    data: str
    """The log."""
    out: str
    """The log to write: train without the held-out rows, test with them and their negatives."""
    schema: Schema = field(default_factory=Schema)
    by: Literal["random", "last"] = "random"
    """Which row of each user is held out; `last` needs a time column."""
    negatives: int = 99
    """Items that the user never touched, drawn for each held-out row."""
    seed: int = 0
    """Seed of both draws."""


@dataclass(frozen=True, kw_only=True)
class SampleCommand:
    """Write a sample of a log once, as a log of its own, for the many runs that follow.

    `recpress train --data OUT --sample.rate 1` then trains on exactly the rows that `--data DATA` with these --sample
    options would, and reads nothing else."""

    data: str
    """The log."""
    out: str
    """The log to write; must not exist unless --overwrite. Its train are the sampled rows with all their columns; the
    held-out parts, side tables and vocabularies are copied."""
    schema: Schema = field(default_factory=Schema)
    sample: SampleConfig = field(default_factory=lambda: SampleConfig(rate=0.1))
    shuffle: bool = False
    """Write the rows in a random order, by way of the local disk; otherwise in the order of the log. A shuffled log may
    be sampled by --sample.kind block."""
    shuffle_rows: int = 1 << 22
    """Rows that are shuffled in memory at a time; up to five times as many are held."""
    on_bad_file: Literal["stop", "skip"] = "stop"
    """A file or row group of train that cannot be read, after the retries: `stop` ends the stage with its name; `skip`
    leaves its rows out, names and counts it (docs/log.md)."""
    layout: LayoutConfig = field(default_factory=LayoutConfig)
    """Files and row groups."""
    overwrite: bool = False
    """Replace an existing --out."""

    def __post_init__(self) -> None:
        at_least(1, shuffle_rows=self.shuffle_rows)


@dataclass(frozen=True, kw_only=True)
class FactorizeConfig:
    """Factorize the full interaction matrix of a log."""

    data: str
    """The log: a folder, file or glob."""
    out: str
    """Folder of the factors; must not exist unless --overwrite."""
    schema: Schema = field(default_factory=Schema)
    method: Literal["als", "logistic"] = "als"
    """`als`: weighted least squares; `logistic`: cross-entropy with sampled negatives."""
    als: ALSConfig = field(default_factory=ALSConfig)
    logistic: LogisticConfig = field(default_factory=LogisticConfig)
    crossfit_rate: float = 0.0
    """Above 0: also make factors that have not seen this share of the rows, for a network trained on it."""
    crossfit_seed: int = 0
    """Seed of that sample; the same as the network's --sample.seed."""
    crossfit_kind: Literal["rows", "block", "user"] = "rows"
    """Kind of that sample; the same as the network's --sample.kind."""
    crossfit_sweeps: int = 1
    """Sweeps over the other rows, from the factors of all rows, that let the vectors forget the sample."""

    use_label: bool = False
    """Let the label scale the confidence of a row; otherwise every row counts one."""
    on_bad_file: Literal["stop", "skip"] = "stop"
    """A file or row group that cannot be read, after the retries: `stop` ends the stage with its name; `skip` leaves
    its rows out, names and counts it (docs/log.md)."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the sweeps run."""
    overwrite: bool = False
    """Replace an existing --out."""

    def __post_init__(self) -> None:
        if not 0 <= self.crossfit_rate < 1:
            raise InputError(f"crossfit_rate is {self.crossfit_rate}, expected a number in [0, 1)")
        at_least(1, crossfit_sweeps=self.crossfit_sweeps)


_LOSS = LossConfig(kind="softmax", scale=8.0, candidates=100)
_TOWERS = TowersConfig(kind="residual", hidden=(256,), dropout=0.7, penalty=0.1)


@dataclass(frozen=True, kw_only=True)
class NetworkConfig:
    """The network and how it is trained, whatever the log.

    The defaults are for frozen factors: towers that start with the factors' own scores and can learn little, many
    negatives that the rows of a batch share, few epochs (benchmarks/README.md says how they were chosen).
    """

    stream: StreamConfig = field(default_factory=lambda: StreamConfig(batch_size=2048))
    negatives: NegativesConfig = field(
        default_factory=lambda: NegativesConfig(count=512, shared=True, reject_positives=True)
    )
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


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Rank the held-out rows of a log."""

    data: str
    """The log, with held-out rows."""
    model: str
    """A checkpoint of `recpress train`, or factors of `recpress factorize`."""
    out: str | None = None
    """JSON file for the metrics; they are printed in any case."""
    schema: Schema = field(default_factory=Schema)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the scores are computed."""


@dataclass(frozen=True, kw_only=True)
class SynthCommand(SynthConfig):
    """A made log with planted tastes, power-law activity and popularity, and a held-out interaction a user."""

    out: str
    """Folder of the log; must not exist unless --overwrite."""
    overwrite: bool = False
    """Replace an existing --out."""


@dataclass(frozen=True, kw_only=True)
class SynthCriteoCommand(SynthCriteoConfig):
    """A made log with Criteo's columns: a label, 13 numbers, 26 categorical features whose ids are alike in groups."""

    out: str
    """Folder of the log; must not exist unless --overwrite."""
    overwrite: bool = False
    """Replace an existing --out."""


@dataclass(frozen=True, kw_only=True)
class IngestCommand(IngestConfig):
    """How files of another format become a log."""

    out: str
    """Folder of the log; must not exist unless --overwrite."""
    overwrite: bool = False
    """Replace an existing --out."""


def _random_network() -> NetworkConfig:
    """On random tables: the same loss, little dropout, a constant rate, stopped where it no longer gets better."""
    return NetworkConfig(
        stream=StreamConfig(batch_size=4096),
        model=TwoTowerConfig(
            tables=TablesConfig(strategy="random", dim=64),
            towers=TowersConfig(kind="residual", hidden=(128,), dropout=0.1),
            loss=_LOSS,
        ),
        optimizer=OptimizerConfig(learning_rate=1e-3, table_learning_rate=0.05),
        epochs=40,
    )


def _tuned_network() -> NetworkConfig:
    """On factors that are trained on: as on frozen ones, the tables by small steps."""
    frozen = NetworkConfig()
    return replace(
        frozen,
        model=replace(frozen.model, tables=TablesConfig(strategy="init-train")),
        optimizer=replace(frozen.optimizer, table_learning_rate=0.01),
    )


def _whole_log(**networks: NetworkConfig) -> None:
    """Raise InputError where a network of a comparison is to go on without what cannot be read."""
    for name, network in networks.items():
        if network.stream.on_bad_file != "stop":
            raise InputError(
                f"{name}.stream.on_bad_file is '{network.stream.on_bad_file}'; expected stop: all that is compared is "
                "made of the same rows"
            )


@dataclass(frozen=True, kw_only=True)
class CompareCadcConfig:
    """The strategies of the CADC paper side by side, over several seeds, with a report page."""

    data: str | None = None
    """The log, with held-out rows; without one a made log is written and used."""
    out: str = "runs/compare-cadc"
    """Folder of the report, the results as JSON, and all factors and models; must not exist unless --overwrite."""
    schema: Schema = field(default_factory=Schema)
    synth: SynthConfig = field(default_factory=SynthConfig)
    seeds: tuple[int, ...] = (0, 1, 2)
    """Each seed has its own sample, factorization and networks."""
    rate: float = 0.1
    """Share of the rows that the networks are trained on."""
    als: ALSConfig = field(
        default_factory=lambda: ALSConfig(
            factors=192,
            sweeps=12,
            confidence=1.0,
            unobserved_weight=0.15,
            regularization=0.0105,
            frequency_exponent=1.0,
        )
    )
    """The defaults were chosen on a validation part of MovieLens-1M (benchmarks/README.md)."""
    crossfit_sweeps: int = 1
    """Sweeps without the sample that make the factors to train on."""
    frozen: NetworkConfig = field(default_factory=NetworkConfig)
    random: NetworkConfig = field(default_factory=_random_network)
    tuned: NetworkConfig = field(default_factory=_tuned_network)
    """The network on factors that are trained on."""
    choose: bool = True
    """Choose each network's number of epochs, up to --*.epochs, on one row a user that is held out of train."""
    patience: int = 3
    """Epochs without a better one after which the choice is made."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where everything runs."""
    overwrite: bool = False
    """Replace an existing --out."""

    def __post_init__(self) -> None:
        _whole_log(frozen=self.frozen, random=self.random, tuned=self.tuned)


@dataclass(frozen=True, kw_only=True)
class HashStageConfig(HashConfig):
    """Map the ids of tables to fewer rows, from their counts and an embedding, under a budget."""

    data: str
    """The log: a folder, file or glob."""
    out: str
    """Folder of the maps; must not exist unless --overwrite."""
    factors: str | None = None
    """Folder of factors of this log: the embedding of users and items."""
    embedding: tuple[str, ...] = ()
    """Embeddings from elsewhere, as TABLE=FILE: a .npy, a .parquet, or FILE.pt:KEY; they come before the factors."""
    features: tuple[str, ...] = ()
    """Categorical columns of the log to map, instead of users and items. Those without an embedding get one from a
    quick warm-up: a factorization machine of the label."""
    warm_rows: int = 1_000_000
    """About so many rows, a uniform sample, train the warm-up. It sees labels, and so does a map of it: take a part of
    the log, not all of it, where a network is to train on the same rows (docs/criteo.md)."""
    warm_dim: int = 8
    """Dimension of its vectors."""
    share: float = 0.25
    """Budget of rows, all tables together, as a share of their ids."""
    rows: int = 0
    """The budget as a number of rows; 0: --share."""
    bytes: int = 0
    """The budget in bytes of float32 rows of the embedding's dimension; 0: --rows or --share."""
    table_rows: tuple[str, ...] = ()
    """Rows of single tables, as TABLE=ROWS; the others share what is left of the budget."""
    split: Literal["distortion", "ids"] = "distortion"
    """How tables share the budget: where a row lowers the distortion most (`cluster`, `learned`), or in proportion to
    their ids (the other methods always)."""
    row_vectors: bool = True
    """Write the vector of each row too, the best fit of its ids' embedding; `recpress train` starts from them."""
    extend: str | None = None
    """Maps of an earlier part of this log: its ids keep their rows, new ones get the nearest or a hashed one."""
    on_bad_file: Literal["stop", "skip"] = "stop"
    """A file or row group that cannot be read, after the retries: `stop` ends the stage with its name; `skip` leaves
    its rows out of the counts and the warm-up, names and counts it (docs/log.md)."""
    schema: Schema = field(default_factory=Schema)
    overwrite: bool = False
    """Replace an existing --out."""

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise InputError(f"share is {self.share}, expected a number in (0, 1]")
        at_least(0, rows=self.rows, bytes=self.bytes)
        at_least(1, warm_rows=self.warm_rows, warm_dim=self.warm_dim, iterations=self.iterations)


@dataclass(frozen=True, kw_only=True)
class CompareHashConfig:
    """All hashing methods side by side on one log: one backbone, one budget of rows, several seeds, a report page."""

    data: str | None = None
    """The log, with test rows and, to choose on, val rows; without one a made log is written and used."""
    out: str = "runs/compare-hash"
    """Folder of the report and the results as JSON; must not exist unless --overwrite."""
    schema: Schema = field(default_factory=Schema)
    synth: SynthConfig = field(default_factory=SynthConfig)
    methods: tuple[str, ...] = (
        "modulo", "double", "frequency", "hybrid", "quotient-remainder", "louvain", "co-cluster", "cluster", "learned",
        "learned-2",
    )  # fmt: skip
    """Methods, by name; `learned-2`: learned with two weighted rows an id."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Each seed has its own factorization and its own maps."""
    share: float = 0.2
    """Budget of rows, users and items together, as a share of the ids."""
    rows: int = 0
    """The budget itself; 0: --share."""
    als: ALSConfig = field(
        default_factory=lambda: ALSConfig(
            factors=64,
            sweeps=9,
            confidence=1.0,
            unobserved_weight=0.02,
            regularization=0.01,
            frequency_exponent=1.0,
        )
    )
    """The backbone, with a row for each id and with shared rows alike."""
    hash: HashConfig = field(default_factory=HashConfig)
    """What the methods have in common; what is chosen overrides it."""
    user_shares: tuple[float, ...] = (0.3, 0.5, 0.65)
    """Shares of the budget for users that are tried, besides the ids' own proportion and the stated criterion."""
    privates: tuple[float, ...] = (0.25, 0.75)
    """Shares of private rows that are tried, besides a half."""
    powers: tuple[float, ...] = (0.0, 0.25, 1.0)
    """Powers of the count that are tried, besides --hash.power."""
    sweeps: tuple[int, ...] = (0, 1, 3)
    """Sweeps with shared rows that are tried; 0 leaves the rows nearest to the full factors."""
    choose_users: int = 4000
    """Users on whose validation rows settings are chosen."""
    metric: str = "Recall@10"
    """What they are chosen by."""
    evaluation: EvaluationConfig = field(default_factory=lambda: EvaluationConfig(protocol="full", k=(10, 50)))
    overwrite: bool = False
    """Replace an existing --out."""


@dataclass(frozen=True, kw_only=True)
class CompareBothConfig:
    """Both savings together: quality against the bytes of the tables and against the rows read, with a report page."""

    data: str | None = None
    """The log, with held-out rows; without one a made log is written and used."""
    out: str = "runs/compare-both"
    """Folder of the report, the results as JSON, and all factors, maps and models; must not exist unless
    --overwrite."""
    schema: Schema = field(default_factory=Schema)
    synth: SynthConfig = field(default_factory=SynthConfig)
    seeds: tuple[int, ...] = (0, 1, 2)
    """Each seed has its own sample, factorization, maps and networks."""
    levels: tuple[float, ...] = (1.0, 0.5, 0.25, 0.1, 0.05)
    """Bytes of the tables, maps included, as shares of those of full float32 tables."""
    rates: tuple[float, ...] = (0.1, 1.0)
    """Shares of the rows that networks are trained on; none: the factors' own scores alone."""
    als: ALSConfig = field(default_factory=lambda: CompareCadcConfig().als)
    """The defaults are those of `compare cadc`."""
    power: float = 0.5
    """An id weighs as much as this power of its count, in maps and in the distortion."""
    frozen: NetworkConfig = field(default_factory=NetworkConfig)
    metrics: tuple[Literal["HR", "NDCG", "Recall"], ...] = ("HR", "NDCG")
    """Metrics of the table, at the first --evaluation.k; the last one is plotted."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where everything runs; maps are made on the CPU."""
    overwrite: bool = False
    """Replace an existing --out."""

    def __post_init__(self) -> None:
        _whole_log(frozen=self.frozen)
        for name in ("levels", "rates"):
            bad = [value for value in getattr(self, name) if not 0 < value <= 1]
            if bad:
                raise InputError(f"{name}: {bad[0]}, expected numbers in (0, 1]")
