"""Configuration of factorization, id maps, tables and towers. Imports no torch, so that `--help` is fast."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

Config = TypeVar("Config", bound=type)


def accepts_old_names(**names: str) -> Callable[[Config], Config]:
    """A class decorator: old keyword -> its name now, accepted for one release with a DeprecationWarning."""

    def decorate(cls: Config) -> Config:
        init = cls.__init__  # type: ignore[misc]

        @functools.wraps(init)
        def renamed(self: Any, **values: Any) -> None:
            for old in names.keys() & values.keys():
                warnings.warn(f"{cls.__name__}: {old} is now {names[old]}", DeprecationWarning, stacklevel=2)
                values[names[old]] = values.pop(old)
            init(self, **values)

        cls.__init__ = renamed  # type: ignore[misc]
        return cls

    return decorate


@dataclass(frozen=True, kw_only=True)
class ALSConfig:
    """Weighted least squares for implicit feedback (Hu, Koren, Volinsky 2008), in settings that do not depend on the
    size of the log.

    `modules.als.auto` chooses each setting that is not given: it compares a few candidates on held-out examples of the
    input, at about the cost of one factorization. `ALSParameters` has the objective.
    """

    factors: int | None = None
    """Dimension of the vectors. Default: chosen, at most --als.max-factors."""
    max_factors: int = 128
    """Largest dimension to choose."""
    sweeps: int | None = None
    """Number of sweeps. A sweep solves all users and all items once. Default: until a sweep lowers the objective by
    less than 0.2 %, at most 15; with --als.no-auto, 10."""
    unobserved_ratio: float | None = None
    """Total weight of all pairs without an interaction, relative to that of all interactions. Default: chosen."""
    mean_penalty: float | None = None
    """Mean L2 penalty of a user's vector, in units of the mean weight of an interaction. Default: chosen."""
    item_exponent: float | None = None
    """Exponent of 1 / (count of the item) in the weight of an interaction; 0 weighs all interactions equally. Default:
    chosen."""
    frequency_exponent: float = 0.5
    """How the penalty grows with an id's weight in the loss. 0: the same for every id; 1: in proportion."""
    confidence: float = 1.0
    """Weight added by an interaction, per unit of its value."""
    unobserved_weight: float | None = None
    """For experts: absolute weight of a pair without an interaction. Replaces --als.unobserved-ratio."""
    regularization: float | None = None
    """For experts: absolute L2 regularization. Replaces --als.mean-penalty."""
    auto: bool = True
    """Choose the settings that are not given. Otherwise each has a fixed default."""
    auto_metric: Literal["auto", "sampled", "full"] = "auto"
    """How to compare candidates: by NDCG@10 of a held-out item among 99 sampled items (`sampled`) or among all items
    (`full`). `auto`: as the test part of the log is ranked, or `sampled` if there is none."""
    auto_trials: int = 8
    """Candidates to compare. Those after the first 8 are drawn at random."""
    auto_cost: float = 1.0
    """Approximate cost of the choice, in factorizations."""
    solver: Literal["auto", "cg", "cholesky"] = "auto"
    """How to solve each row's normal equations. `cholesky`: exactly. `cg`: three steps of preconditioned conjugate
    gradients from the vector of the last sweep. `auto`: two such steps in the first two sweeps, then one over-relaxed
    step; the fastest, and usually with the lowest objective."""
    tolerance: float = 0.0
    """Stop one sweep after the objective fell by less than this share. 0 runs all --als.sweeps sweeps."""
    seed: int = 0
    """Seed of the initial vectors and of the choice."""


@dataclass(frozen=True, kw_only=True)
class ALSParameters:
    """The absolute parameters of one factorization, derived from `ALSConfig` for a log.

    Minimizes  sum_(u,i) c_ui (p_ui - x_u . y_i)^2 + sum_u reg_u |x_u|^2 + sum_i reg_i |y_i|^2
    with p_ui = 1 and c_ui = unobserved_weight + confidence * g_i * value for an interaction, p_ui = 0 and
    c_ui = unobserved_weight elsewhere; g_i = item_scale * n_i ** -item_exponent; reg_u = regularization * (n_u +
    unobserved_weight * num_items) ** frequency_exponent (Rendle et al. 2022), and likewise reg_i. n_u and n_i count
    distinct interactions; num_items and num_users are `used_items` and `used_users` if these are given.
    """

    factors: int = 64
    """Dimension of the vectors."""
    sweeps: int = 15
    """Number of sweeps. A sweep solves all users and all items once."""
    confidence: float = 8.0
    """Weight added by an interaction, per unit of its value."""
    unobserved_weight: float = 1.0
    """Weight of a pair without an interaction."""
    regularization: float = 60.0
    """L2 regularization."""
    frequency_exponent: float = 0.0
    """0: the same for every row; 1: in proportion to its weight in the loss."""
    item_exponent: float = 0.0
    """The larger, the less interactions of frequent items weigh."""
    item_scale: float = 1.0
    """Makes the mean weight of an interaction independent of `item_exponent`."""
    used_users: int | None = None
    """Number of users with an interaction, so that unused ids do not raise the penalty."""
    used_items: int | None = None
    """Number of items with an interaction."""
    solver: Literal["auto", "cg", "cholesky"] = "auto"
    """As in `ALSConfig`."""
    tolerance: float = 0.0
    """As in `ALSConfig`."""
    seed: int = 0
    """Seed of the initial vectors."""


@dataclass(frozen=True, kw_only=True)
class LogisticConfig:
    """Logistic matrix factorization: sigmoid(u.v + b_u + b_v + b), cross-entropy, sampled negatives (the factorization
    of the CADC paper)."""

    factors: int = 64
    """Dimension of the vectors, without the two columns for the biases."""
    epochs: int = 20
    """Passes over the log."""
    learning_rate: float = 0.05
    """Learning rate of row-wise Adagrad."""
    weight_decay: float = 0.0
    """L2 penalty on the rows of a batch."""
    negatives: int = 4
    """Sampled negatives per positive."""
    seed: int = 0
    """Seed of the initial vectors."""


@dataclass(frozen=True, kw_only=True)
class ContrastiveConfig:
    """Contrastive factorization: each user against its items and sampled negatives, by the cosine of their vectors."""

    factors: int = 64
    """Dimension of the vectors."""
    loss: Literal["softmax", "ccl", "logistic"] = "softmax"
    """`softmax`: sampled softmax with logQ correction; `ccl`: cosine contrastive loss (SimpleX); `logistic`: weighted
    cross-entropy of each pair."""
    temperature: float | None = None
    """`softmax`, `logistic`: divides the cosine; 0.02 to 1. The smaller, the more the hardest negatives count. Default:
    chosen; with --softmax.no-auto, 0.1."""
    margin: float = 0.4
    """`ccl`: negatives below this cosine do not count."""
    negative_weight: float = 150.0
    """`ccl`, `logistic`: weight of all negatives of a user, in units of a positive."""
    epochs: int | None = None
    """Passes over the interactions. Default: chosen among 20, 50 and 150; with --softmax.no-auto, 150."""
    auto: bool = True
    """Choose the settings that are not given, on held-out examples of at most a million interactions. Otherwise each
    has a fixed default."""
    patience: int = 0
    """Stop early after this many checks, one every five epochs, without a better NDCG@10 of held-out interactions, one
    of up to 3,000 users; 0: train all epochs. The last tenth of the epochs trains on all interactions."""
    learning_rate: float = 0.05
    """Of row-wise Adam at the start; falls linearly to 5 % of it."""
    batch_users: int = 128
    """Users of a step over all ranks, each with all its interactions."""
    batch_limit: int = 16384
    """Most interactions of a step and rank. A user with more is split over several steps."""
    negatives: int = 1024
    """Negatives of a step and rank, shared by its users."""
    negative_exponent: float = 0.5
    """Negatives are drawn in proportion to count ** exponent of the item; 0: uniformly."""
    user_exponent: float = 0.5
    """An interaction weighs 1 / count ** exponent of its user."""
    popularity_exponent: float | None = None
    """Length of an item's vector: count ** exponent. Of items with equal cosines, popular ones rank first. Default:
    chosen among 0, 0.025, 0.05, 0.1 and 0.15 if temperature or epochs are chosen, otherwise 0.05."""
    seed: int = 0
    """Seed of the initial vectors, the order of users and the negatives."""


HISTORY = "history"
"""Feature key of the items of a user."""


@dataclass(frozen=True, kw_only=True)
class TablesConfig:
    """Where embedding tables start, and whether they are trained."""

    strategy: Literal["random", "warm-start", "frozen", "frozen+residual"] = "frozen"
    """`random`: random, trained; `warm-start`: factors, trained; `frozen`: factors, not trained (CADC);
    `frozen+residual`: frozen factors plus a small trainable table."""
    dim: int = 64
    """Dimension of `random` tables. Others have the dimension of the factors."""
    storage: Literal["fp32", "fp16", "int8", "int4"] = "fp32"
    """How to store frozen rows. `int8` and `int4` have a scale and an offset per row."""
    residual_dim: int = 16
    """Dimension of the trainable table of `frozen+residual`."""
    history: Literal["none", "add", "only"] = "none"
    """A user's train items, each with a row of a further table. `add`: the sum of the rows, scaled to length one, joins
    the user tower; `only`: it replaces the user's row, so that new users need none. The rows are trained, or with
    frozen tables those of the item factors. In training the item of the example does not count."""
    history_length: int = 100
    """Most items of a history: the latest by the time column, or the last ones in the order of the log."""


@dataclass(frozen=True, kw_only=True)
class TowersConfig:
    """The networks between the tables and the dot product."""

    kind: Literal["mlp", "residual"] = "residual"
    """`mlp`: out = MLP(e); `residual`: out = e exp(gate) + MLP(e), which starts with the ranking of the factors."""
    hidden: tuple[int, ...] = (256,)
    """Widths of the hidden layers."""
    dim: int = 64
    """Output dimension of `mlp`. `residual` has the dimension of the table."""
    dropout: float = 0.0
    """Dropout rate of the hidden layers."""
    penalty: float = 0.0
    """`residual`: weight in the loss of the mean square of the MLP's output, in units of the table's standard
    deviation."""
    feature_dim: int = 8
    """Dimension of the trainable table of each additional categorical feature."""


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """The training loss of the towers."""

    kind: Literal["bce", "softmax"] = "bce"
    """`bce`: cross-entropy of each pair (CADC); `softmax`: sampled softmax with logQ correction."""
    in_batch: bool = False
    """`softmax`: use the positives of other examples in the batch as negatives, too."""
    candidates: int = 0
    """`softmax`: number of candidates of the ranking task, for example 100 for a test with 99 negatives; 0: all
    items."""
    scale: float = 8.0
    """Initial value of the learned factor between dot product and logit."""
    bias: float = -4.0
    """`bce`: initial value of the learned offset of the logit."""


@dataclass(frozen=True, kw_only=True)
class TwoTowerConfig:
    """The two-tower network."""

    tables: TablesConfig = field(default_factory=TablesConfig)
    towers: TowersConfig = field(default_factory=TowersConfig)
    loss: LossConfig = field(default_factory=LossConfig)


HashMethod = Literal[
    "learned", "cluster", "co-cluster", "louvain", "frequency", "hybrid", "double", "quotient-remainder", "universal",
    "modulo",
]  # fmt: skip


@accepts_old_names(private="exclusive_share", power="count_exponent", ways="rows_per_id")
@dataclass(frozen=True, kw_only=True)
class HashConfig:
    """How to map ids to fewer rows."""

    method: HashMethod = "learned"
    """Hashing method; `recpress.modules.hashing.methods` has the table of methods, docs/train/hash.md explains each."""
    exclusive_share: float = -1.0
    """Share of the rows that belong to one id each, the most frequent ids (`learned`, `frequency`, `hybrid`).
    Negative: the default of the method."""
    count_exponent: float = 0.5
    """`learned`, `co-cluster`: exponent of the count in an id's weight."""
    rows_per_id: Literal[1, 2] = 1
    """`learned`: rows per id. With 2, an id is the weighted sum of two rows, much closer to the embedding, at the price
    of a larger map and two look-ups (`hashing.two_row`)."""
    row_weights: bool = True
    """`learned` with two rows per id: weigh each row. Without weights, an id is the sum of two rows, and the map takes
    less than half of the bytes (`hashing.additive`)."""
    iterations: int = 15
    """Passes of the clustering over the ids."""
    seed: int = 0
    """Seed of the hash functions and of the clustering."""
