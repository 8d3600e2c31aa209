"""Configuration of `recpress compare`. Free of torch."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

from recpress.data.config import Schema, SynthConfig
from recpress.data.errors import InputError
from recpress.modules.config import ALSConfig, HashConfig
from recpress.trainer.config import EvaluationConfig, NetworkConfig, at_least, network_for


def _frozen_network() -> NetworkConfig:
    return network_for("frozen", NetworkConfig())


def _random_network() -> NetworkConfig:
    """On random tables, with a smaller hidden layer; stopped where it no longer gets better."""
    network = network_for("random", NetworkConfig())
    return replace(network, model=replace(network.model, towers=replace(network.model.towers, hidden=(128,))))


def _tuned_network() -> NetworkConfig:
    """On factors that are trained on: as on frozen ones, the tables by small steps."""
    return network_for("warm-start", NetworkConfig())


def _between(low: float, high: float, **options: tuple[float, ...]) -> None:
    """Raise InputError where a value of an option lies outside of [low, high]."""
    for name, values in options.items():
        for value in values:
            if not low <= value <= high:
                raise InputError(f"{name}: {value}, expected numbers from {low} to {high}")


MAX_TRIALS = 3
TRIALS: dict[str, tuple[dict[str, float], ...]] = {
    "random": (
        {},
        {"batch_size": 4096, "learning_rate": 1e-3, "table_learning_rate": 0.05},
        {"batch_size": 512, "learning_rate": 3e-3, "table_learning_rate": 0.2, "dropout": 0.5},
    ),
    "frozen": ({}, {"learning_rate": 5e-4}, {"learning_rate": 1e-3, "dropout": 0.5}),
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
    """The log, with held-out rows; without one a synthetic log is written and used."""
    out: str = "runs/compare-cadc"
    """Folder of the report, the results as JSON, and all factors and models; must not exist unless --overwrite."""
    schema: Schema = field(default_factory=Schema)
    synth: SynthConfig = field(default_factory=SynthConfig)
    seeds: tuple[int, ...] = (0, 1, 2)
    """Each seed has its own sample, factorization and networks."""
    rate: float = 0.1
    """Share of the rows that the networks are trained on."""
    als: ALSConfig = field(default_factory=ALSConfig)
    """The factorization; what is not given is chosen on held-out examples of train."""
    crossfit_sweeps: int = 3
    """Sweeps without the sample that make the factors to train on."""
    frozen: NetworkConfig = field(default_factory=_frozen_network)
    random: NetworkConfig = field(default_factory=_random_network)
    tuned: NetworkConfig = field(default_factory=_tuned_network)
    """The network on factors that are trained on."""
    choose: bool = True
    """Choose each network's settings and number of epochs on one row a user that is held out of train; without, there
    are no speed-ups."""
    trials: int = 3
    """Settings that are tried for each strategy, the same number for all: those configured, then other learning rates,
    batch sizes and dropouts."""
    patience: int = 3
    """Epochs without a better one after which a trial ends."""
    bpr: bool = True
    """Also fit Bayesian personalized ranking by the library `implicit`, on logs of up to 2,000,000 rows."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where everything runs."""
    overwrite: bool = False
    """Replace an existing --out."""

    def __post_init__(self) -> None:
        _whole_log(frozen=self.frozen, random=self.random, tuned=self.tuned)
        if not 1 <= self.trials <= MAX_TRIALS:
            raise InputError(f"trials is {self.trials}, expected 1 to {MAX_TRIALS}")


@dataclass(frozen=True, kw_only=True)
class CompareHashConfig:
    """All hashing methods side by side on one log: one backbone, one budget of rows, several seeds, a report page."""

    data: str | None = None
    """The log, with test rows and, to choose on, val rows; without one a synthetic log is written and used."""
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
    als: ALSConfig = field(default_factory=ALSConfig)
    """The backbone, with a row for each id and with shared rows alike; what is not given is chosen on held-out examples
    of train."""
    hash: HashConfig = field(default_factory=HashConfig)
    """What the methods have in common; what is chosen overrides it."""
    trials: int = 10
    """Settings that are tried for each method, the same number for all; a method that has fewer tries them all."""
    user_shares: tuple[float, ...] = (0.3, 0.5, 0.65)
    """Shares of the budget for users that are tried, besides the ids' own proportion and the stated criterion."""
    exclusive_shares: tuple[float, ...] = (0.25, 0.75)
    """Further shares of exclusive rows to try, besides a half."""
    count_exponents: tuple[float, ...] = (0.0, 0.25, 1.0)
    """Further exponents of the count to try, besides --hash.count-exponent."""
    sweeps: tuple[int, ...] = (0, 1, 3)
    """Sweeps with shared rows that are tried; 0 leaves the rows nearest to the full factors."""
    choose_users: int = 4000
    """Users on whose validation rows settings are chosen."""
    metric: str = "Recall@10"
    """What they are chosen by."""
    evaluation: EvaluationConfig = field(default_factory=lambda: EvaluationConfig(protocol="full", k=(10, 50)))
    overwrite: bool = False
    """Replace an existing --out."""

    def __post_init__(self) -> None:
        at_least(1, trials=self.trials, choose_users=self.choose_users)
        at_least(0, rows=self.rows, sweeps=min(self.sweeps, default=0))
        _between(0, 1, user_shares=self.user_shares, exclusive_shares=self.exclusive_shares)
        if not self.rows:
            _between(0, 1, share=(self.share,))
        if self.evaluation.protocol == "sampled":
            raise InputError("evaluation.protocol: 'sampled', expected full: compare hash ranks all items")
        names = [f"{name}@{k}" for k in self.evaluation.k for name in ("Recall", "NDCG", "HR")] + ["MRR", "AUC"]
        if self.metric not in names:
            raise InputError(f"metric: {self.metric!r}, expected one of {', '.join(names)}")


@dataclass(frozen=True, kw_only=True)
class CompareBothConfig:
    """Both savings together: quality against the bytes of the tables and against the rows read, with a report page."""

    data: str | None = None
    """The log, with held-out rows; without one a synthetic log is written and used."""
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
    als: ALSConfig = field(default_factory=ALSConfig)
    """The factorization; what is not given is chosen on held-out examples of train."""
    count_exponent: float = 0.5
    """Exponent of the count in an id's weight, in maps and in the distortion."""
    frozen: NetworkConfig = field(default_factory=_frozen_network)
    choose: bool = True
    """Choose the networks' number of epochs, from 0, the factors' own ranking, to --frozen.epochs, on one row a user
    that is held out of train."""
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
