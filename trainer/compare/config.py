"""Configuration of `recpress compare`. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

from tyro.conf import Suppress

from recpress.data.config import NegativesConfig, Schema, SynthConfig
from recpress.data.errors import InputError
from recpress.modules.config import ALSConfig, ContrastiveConfig, HashConfig, LogisticConfig, LossConfig
from recpress.trainer.config import EvaluationConfig, NetworkConfig, RankingMetric, at_least, network_for
from recpress.trainer.features.config import FeatureConfig
from recpress.trainer.model.config import DCNConfig, DLRMConfig

_RANKING_METRICS = ", ".join(get_args(RankingMetric))


def _frozen_network() -> NetworkConfig:
    return network_for("frozen", NetworkConfig())


def _random_network() -> NetworkConfig:
    """On random tables, with a smaller hidden layer."""
    network = network_for("random", NetworkConfig())
    return replace(network, model=replace(network.model, towers=replace(network.model.towers, hidden=(128,))))


def _tuned_network() -> NetworkConfig:
    """On factors that are trained on: as on frozen ones, with small steps of the tables."""
    return network_for("warm-start", NetworkConfig())


def _check_metrics(metrics: tuple[RankingMetric, ...]) -> None:
    if not metrics or len(set(metrics)) < len(metrics):
        raise InputError(f"metrics: {' '.join(metrics) or 'none'}, expected some of {_RANKING_METRICS}, each once")


def _between(low: float, high: float, **options: tuple[float, ...]) -> None:
    """Raise InputError if a value of an option is outside [low, high]."""
    for name, values in options.items():
        for value in values:
            if not low <= value <= high:
                raise InputError(f"{name}: {value}, expected numbers from {low} to {high}")


def _paper_network() -> NetworkConfig:
    """The tower of the CADC paper: an MLP, trained by cross-entropy with a few negatives for each positive."""
    network = network_for("frozen", NetworkConfig())
    towers = replace(network.model.towers, kind="mlp", hidden=(128,), dropout=0.1, penalty=0.0)
    return replace(
        network,
        negatives=NegativesConfig(count=4),
        model=replace(network.model, towers=towers, loss=LossConfig(kind="bce")),
        optimizer=replace(network.optimizer, learning_rate=1e-3, schedule="constant", warmup_steps=0),
        epochs=20,
    )


MAX_TRIALS = 3
STRATEGIES = ("random-all", "random-sample", "train-sample", "cadc", "freeze-all")
MORE_STRATEGIES = ("core-sample", "recent-sample", "popular-sample", "paper")
"""Those that `compare cadc` runs only on request."""
TRIALS: dict[str, tuple[dict[str, float], ...]] = {
    "random": (
        {},
        {"batch_size": 4096, "learning_rate": 1e-3, "table_learning_rate": 0.05},
        {"batch_size": 512, "learning_rate": 3e-3, "table_learning_rate": 0.2, "dropout": 0.5},
    ),
    "frozen": ({}, {"learning_rate": 5e-4}, {"learning_rate": 1e-3, "dropout": 0.5}),
    "paper": ({}, {"learning_rate": 3e-4}, {"learning_rate": 3e-3}),
    "tuned": ({}, {"table_learning_rate": 0.003}, {"learning_rate": 1e-3, "table_learning_rate": 0.03}),
}
"""Network of `compare cadc` -> what each trial changes in it. On sparse logs random tables need many small steps at a
high rate to pass popularity before they overfit; on dense ones large batches may be as good and faster."""


def changed(network: NetworkConfig, change: dict[str, float]) -> NetworkConfig:
    """The network with other values of the settings named."""
    sections: dict[str, Any] = {
        "stream": network.stream,
        "optimizer": network.optimizer,
        "towers": network.model.towers,
    }
    names = {name for section in sections.values() for name in section.__dataclass_fields__}
    assert set(change) <= names, change
    made = {
        key: replace(section, **{name: v for name, v in change.items() if name in section.__dataclass_fields__})
        for key, section in sections.items()
    }
    model = replace(network.model, towers=made["towers"])
    return replace(network, stream=made["stream"], optimizer=made["optimizer"], model=model)


def _whole_log(**networks: NetworkConfig) -> None:
    """Raise InputError if a network is to skip what cannot be read."""
    for name, network in networks.items():
        if network.stream.on_bad_file != "stop":
            raise InputError(
                f"{name}.stream.on_bad_file is '{network.stream.on_bad_file}'; expected stop, so that all "
                "methods use the same examples"
            )


@dataclass(frozen=True, kw_only=True)
class CompareCadcConfig:
    """Compare the strategies of the CADC paper over several seeds, with a report page."""

    data: str | None = None
    """The log, with held-out rows. Default: a synthetic log."""
    out: str = "runs/compare-cadc"
    """Folder of the report, the results as JSON, all factors and models. Must not exist, except with --overwrite."""
    schema: Schema = field(default_factory=Schema)
    synth: SynthConfig = field(default_factory=SynthConfig)
    seeds: tuple[int, ...] = (0, 1, 2)
    """Each seed has its own sample, factorization and networks."""
    rate: float = 0.1
    """Share of the examples that the networks are trained on."""
    strategies: tuple[str, ...] = STRATEGIES
    """Strategies to compare, in addition to `random-all` and `cadc`; `all` is every one. By default `core-sample`,
    `recent-sample` and `popular-sample` are not run (random tables on a tenth of the examples that is no random sample:
    the densest k-core, the latest, those of popular items), nor is `paper`, the setting of the CADC paper (logistic
    factorization, frozen tables, MLP towers, cross-entropy)."""
    method: Literal["als", "softmax", "auto"] = "als"
    """The factorization, as in `recpress factorize`."""
    als: ALSConfig = field(default_factory=ALSConfig)
    """Settings that are not given are chosen on held-out examples of train."""
    softmax: ContrastiveConfig = field(default_factory=ContrastiveConfig)
    logistic: LogisticConfig = field(default_factory=LogisticConfig)
    """The factorization of `paper`."""
    crossfit_sweeps: int = 3
    """Sweeps without the sample, for the factors that networks are trained on."""
    frozen: NetworkConfig = field(default_factory=_frozen_network)
    random: NetworkConfig = field(default_factory=_random_network)
    tuned: NetworkConfig = field(default_factory=_tuned_network)
    """The network on factors that are trained on."""
    paper: NetworkConfig = field(default_factory=_paper_network)
    """The network of `paper`."""
    choose: bool = True
    """Choose each network's settings and number of epochs on one held-out train example per user. Required for
    speed-ups."""
    trials: int = 3
    """Settings to try for each strategy: those configured, then other learning rates, batch sizes and dropouts."""
    patience: int = 3
    """Epochs without improvement after which a trial ends."""
    bpr: bool = True
    """Also fit Bayesian personalized ranking by the library `implicit`, on logs of up to 2,000,000 examples."""
    metrics: tuple[RankingMetric, ...] = ("HR", "NDCG")
    """Metrics of the table, at the first --evaluation.k; the last one is plotted."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where everything runs."""
    overwrite: bool = False
    """Replace an existing --out."""

    def __post_init__(self) -> None:
        _whole_log(frozen=self.frozen, random=self.random, tuned=self.tuned, paper=self.paper)
        known = (*STRATEGIES, *MORE_STRATEGIES)
        if unknown := [name for name in self.strategies if name not in (*known, "all")]:
            raise InputError(f"strategies: {unknown[0]!r}, expected some of {', '.join(known)}, or all")
        _check_metrics(self.metrics)
        if not 1 <= self.trials <= MAX_TRIALS:
            raise InputError(f"trials is {self.trials}, expected 1 to {MAX_TRIALS}")

    @property
    def chosen_strategies(self) -> tuple[str, ...]:
        """In the order of the table, with those that the others are compared with."""
        known = (*STRATEGIES, *MORE_STRATEGIES)
        chosen = known if "all" in self.strategies else ("random-all", "cadc", *self.strategies)
        return tuple(name for name in known if name in chosen)


@dataclass(frozen=True, kw_only=True)
class LightGCNConfig:
    """LightGCN, with the settings of GraphHash and BACO."""

    dim: int = 64
    """Columns of the tables."""
    layers: int = 2
    """Steps of propagation over the graph of train examples."""
    batch_size: int = 1024
    """Train examples of a step, each with one uniform negative. A step propagates over the whole graph, so a large
    batch is faster; it needs a higher learning rate."""
    learning_rate: float = 1e-3
    """Of Adam."""
    weight_decay: float = 1e-8
    """L2 penalty in Adam."""
    init_std: float = 1.0
    """Standard deviation of the initial rows."""
    epochs: int = 1000
    """Maximum of passes over the train examples."""
    evaluate_every: int = 10
    """Epochs between two evaluations on validation examples."""
    patience: int = 5
    """Evaluations without improvement after which training stops. The best one is ranked."""

    def __post_init__(self) -> None:
        at_least(1, **{f"lightgcn.{name}": getattr(self, name) for name in ("dim", "batch_size", "epochs")})
        at_least(1, **{f"lightgcn.{name}": getattr(self, name) for name in ("evaluate_every", "patience")})
        at_least(0, **{f"lightgcn.{name}": getattr(self, name) for name in ("layers", "weight_decay")})
        for name in ("learning_rate", "init_std"):
            if not 0 < getattr(self, name) < math.inf:
                raise InputError(f"lightgcn.{name}: {getattr(self, name)}, expected a positive number")


CLICK_METRICS = ("AUC", "LogLoss", "NE")
CLICK_METHODS = (
    "universal", "double", "quotient-remainder", "frequency", "hybrid", "robe", "cce", "cafe", "cluster", "learned",
    "learned-2",
)  # fmt: skip
HASH_METHODS = (
    "modulo", "double", "frequency", "hybrid", "quotient-remainder", "louvain", "co-cluster", "cluster", "learned",
    "learned-2",
)  # fmt: skip
"""Those of the other backbones."""


@dataclass(frozen=True, kw_only=True)
class ClickConfig:
    """How the models of clicks are trained, `dlrm` and `dcn-v2`."""

    network: DCNConfig = field(default_factory=DCNConfig)
    """Their layers; `dlrm` has no cross layers."""
    dim: int = 16
    """Dimension of all tables."""
    epochs: int = 5
    """Maximum of passes over train."""
    patience: int = 1
    """Epochs without improvement on the validation rows after which training stops. The best weights are measured."""
    batch_size: int = 2048
    """Rows of a step."""
    learning_rate: float = 1e-3
    """Of Adam, for the network."""
    table_learning_rate: float = 0.05
    """Of Adagrad, for the tables."""

    def __post_init__(self) -> None:
        at_least(1, **{f"click.{name}": getattr(self, name) for name in ("epochs", "patience", "batch_size", "dim")})
        if self.dim % 4:
            raise InputError(f"click.dim is {self.dim}, expected a multiple of 4")
        for name in ("learning_rate", "table_learning_rate"):
            if not 0 < getattr(self, name) < math.inf:
                raise InputError(f"click.{name}: {getattr(self, name)}, expected a positive number")

    def network_of(self, model: str) -> DLRMConfig:
        """The options of a model."""
        layers = self.network
        if model == "dcn-v2":
            return layers
        return DLRMConfig(dense_layers=layers.dense_layers, over_layers=layers.over_layers)


@dataclass(frozen=True, kw_only=True)
class CompareHashConfig:
    """Compare all hashing methods with one backbone and one budget of embedding rows, over several seeds, with a report
    page."""

    data: str | None = None
    """The log, with test rows and, to choose settings on, val rows. Default: a synthetic log; `dlrm` and `dcn-v2` need
    one with labels."""
    out: str = "runs/compare-hash"
    """Folder of the report and the results as JSON. Must not exist, except with --overwrite."""
    schema: Schema = field(default_factory=Schema)
    synth: SynthConfig = field(default_factory=SynthConfig)
    methods: tuple[str, ...] = ()
    """Methods; default: all of the backbone. `learned-2`: learned with two rows per id."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Each seed has its own factorization, or full tables, and its own maps."""
    share: float = 0.2
    """Budget of embedding rows of all tables together, as a share of the ids."""
    rows: int = 0
    """Budget as a number of rows; 0: use --share."""
    backbone: Literal["als", "softmax", "lightgcn", "dlrm", "dcn-v2"] = "als"
    """What is trained with one row per id and with the rows of each map. `als`: weighted least squares. `softmax`: the
    contrastive factorization, whose vectors maps are then learned from. `lightgcn`: as
    GraphHash and BACO do; takes minutes to hours for each run, and resumes after a stop. `dlrm`, `dcn-v2`: a model of
    the labels of the log, with tables of all its features."""
    als: ALSConfig = field(default_factory=ALSConfig)
    """The factorization: the backbone `als`, and the embedding from which maps are learned. Settings that are not given
    are chosen on held-out examples of train."""
    softmax: ContrastiveConfig = field(default_factory=ContrastiveConfig)
    """The backbone `softmax`. Temperature and epochs that are not given are chosen on held-out examples of train."""
    lightgcn: LightGCNConfig = field(default_factory=LightGCNConfig)
    click: ClickConfig = field(default_factory=ClickConfig)
    """`dlrm`, `dcn-v2`."""
    label_threshold: float | None = None
    """`dlrm`, `dcn-v2`: labels from here on are 1, others 0; by default labels must be 0 or 1."""
    features: Suppress[Mapping[str, FeatureConfig]] = field(default_factory=dict)
    """`dlrm`, `dcn-v2`: the features, from a TOML file; empty: all columns of the schema."""
    checkpoints: str | None = None
    """`lightgcn`: folder of the checkpoints; default: --out plus `.checkpoints`. Removed at the end."""
    equal_bytes: bool = True
    """Rank methods at equal bytes, too; otherwise at equal rows alone, with half of the runs."""
    equal_rows: bool = True
    """`dlrm`, `dcn-v2`: rank methods at equal rows, too; otherwise at equal bytes alone. The other backbones always
    do, because they choose the settings there."""
    hash: HashConfig = field(default_factory=HashConfig)
    """Settings that all methods share, unless they are chosen per method."""
    trials: int = 10
    """Settings to try for each method. A method with fewer settings tries them all."""
    user_shares: tuple[float, ...] = (0.3, 0.5, 0.65)
    """Shares of the budget for users to try, besides the proportion of the ids and the split by distortion."""
    exclusive_shares: tuple[float, ...] = (0.25, 0.75)
    """Shares of exclusive rows to try, besides a half."""
    count_exponents: tuple[float, ...] = (0.0, 0.25, 1.0)
    """Powers of the count to try, besides --hash.count_exponent."""
    sweeps: tuple[int, ...] = (0, 1, 3)
    """`als`: numbers of sweeps with shared rows to try; 0: the rows nearest to the full factors."""
    shared_epochs: tuple[int, ...] = (0, 20)
    """`softmax`: numbers of epochs with shared rows to try."""
    choose_users: int = 4000
    """Number of users whose validation examples choose the settings."""
    metrics: tuple[RankingMetric, ...] = ("Recall", "NDCG")
    """Metrics of the table, at each --evaluation.k. Methods are ranked by the first one. `dlrm` and `dcn-v2` report
    AUC, LogLoss and NE."""
    metric: str = ""
    """Metric that chooses the settings: by default Recall@10; with `dlrm` and `dcn-v2` AUC (or LogLoss, NE)."""
    evaluation: EvaluationConfig = field(default_factory=lambda: EvaluationConfig(protocol="full", k=(10, 50)))
    overwrite: bool = False
    """Replace an existing --out."""

    def __post_init__(self) -> None:
        at_least(1, trials=self.trials, choose_users=self.choose_users)
        at_least(0, rows=self.rows, sweeps=min(self.sweeps, default=0))
        at_least(0, shared_epochs=min(self.shared_epochs, default=-1))
        _between(0, 1, user_shares=self.user_shares, exclusive_shares=self.exclusive_shares)
        if not self.rows:
            _between(0, 1, share=(self.share,))
        if self.evaluation.protocol == "sampled":
            raise InputError("evaluation.protocol: 'sampled', expected full: compare hash ranks all items")
        names = [f"{name}@{k}" for k in self.evaluation.k for name in get_args(RankingMetric)] + ["MRR", "AUC"]
        names = [*CLICK_METRICS] if self.of_clicks else names
        object.__setattr__(self, "metric", self.metric or ("AUC" if self.of_clicks else "Recall@10"))
        if self.metric not in names:
            raise InputError(f"metric: {self.metric!r}, expected one of {', '.join(names)}")
        known = CLICK_METHODS if self.of_clicks else (*HASH_METHODS, "universal")
        object.__setattr__(self, "methods", self.methods or (CLICK_METHODS if self.of_clicks else HASH_METHODS))
        if unknown := [name for name in self.methods if name not in known]:
            raise InputError(f"methods: {unknown[0]!r}, expected some of {', '.join(known)} with {self.backbone}")
        if self.label_threshold is not None and not math.isfinite(self.label_threshold):
            raise InputError(f"label_threshold is {self.label_threshold}, expected a finite number")
        if self.features and not self.of_clicks:
            raise InputError(f"features: backbone {self.backbone} has users and items only, expected dlrm or dcn-v2")
        _check_metrics(self.metrics)
        if self.of_clicks and self.metrics != type(self).metrics:
            raise InputError(f"metrics: backbone {self.backbone} reports {', '.join(CLICK_METRICS)}, expected no value")
        if not self.equal_rows and not self.of_clicks:
            raise InputError(f"equal_rows: backbone {self.backbone} chooses settings at equal rows, so ranks there")
        if not self.equal_rows and not self.equal_bytes:
            raise InputError("equal_rows, equal_bytes: expected at least one ranking")

    @property
    def of_clicks(self) -> bool:
        """Whether the backbone learns labels."""
        return self.backbone in ("dlrm", "dcn-v2")


@dataclass(frozen=True, kw_only=True)
class CompareBothConfig:
    """Compare quality against bytes of tables and examples read, both savings together, with a report page."""

    data: str | None = None
    """The log, with held-out rows. Default: a synthetic log."""
    out: str = "runs/compare-both"
    """Folder of the report, the results as JSON, all factors, maps and models. Must not exist, except with
    --overwrite."""
    schema: Schema = field(default_factory=Schema)
    synth: SynthConfig = field(default_factory=SynthConfig)
    seeds: tuple[int, ...] = (0, 1, 2)
    """Each seed has its own sample, factorization, maps and networks."""
    levels: tuple[float, ...] = (1.0, 0.5, 0.25, 0.1, 0.05)
    """Bytes of the tables, maps included, as shares of those of full float32 tables."""
    rates: tuple[float, ...] = (0.1, 1.0)
    """Shares of the examples that networks are trained on; none: only the factors' own scores."""
    method: Literal["als", "softmax", "auto"] = "als"
    """The factorization, as in `recpress factorize`."""
    als: ALSConfig = field(default_factory=ALSConfig)
    """Settings that are not given are chosen on held-out examples of train."""
    softmax: ContrastiveConfig = field(default_factory=ContrastiveConfig)
    count_exponent: float = 0.5
    """Exponent of the count in an id's weight, in maps and in the distortion."""
    frozen: NetworkConfig = field(default_factory=_frozen_network)
    choose: bool = True
    """Choose the number of epochs, from 0 (the factors' own ranking) to --frozen.epochs, on one held-out train example
    per user."""
    metrics: tuple[RankingMetric, ...] = ("HR", "NDCG")
    """Metrics of the table, at the first --evaluation.k; the last one is plotted."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where everything runs; maps are built on the CPU."""
    overwrite: bool = False
    """Replace an existing --out."""

    def __post_init__(self) -> None:
        _whole_log(frozen=self.frozen)
        _check_metrics(self.metrics)
        for name in ("levels", "rates"):
            bad = [value for value in getattr(self, name) if not 0 < value <= 1]
            if bad:
                raise InputError(f"{name}: {bad[0]}, expected numbers in (0, 1]")
