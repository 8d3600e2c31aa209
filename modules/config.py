"""Configuration of factorization, tables and towers. Free of torch, so that `--help` answers at once."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class ALSConfig:
    """Weighted least squares for implicit feedback (Hu, Koren, Volinsky 2008), in settings that do not depend on the
    size of the log.

    A setting that is not given is chosen by `modules.als_auto`: it compares a few candidates on examples that are held
    out of the input, at about the cost of one factorization. `ALSParameters` has the objective.
    """

    factors: int | None = None
    """Dimension of the vectors. Not given: chosen, at most --als.max-factors."""
    max_factors: int = 128
    """Largest dimension to choose."""
    sweeps: int | None = None
    """Sweeps; one solves all users and all items once. Not given: until a sweep lowers
    the objective by less than 0.2 %, at most 15; with --als.no-auto, 10."""
    unobserved_ratio: float | None = None
    """Total weight of all pairs without an interaction, relative to that of all interactions. Not given: chosen."""
    mean_penalty: float | None = None
    """Mean L2 penalty of a user's vector, in units of the mean weight of an interaction. Not given: chosen."""
    item_exponent: float | None = None
    """An interaction weighs as much as this power of one over its item's count; 0 weighs all alike. Not given:
    chosen."""
    frequency_exponent: float = 0.5
    """How the penalty grows with an id's weight in the loss; 0: the same for every id, 1: in proportion."""
    confidence: float = 1.0
    """Weight that an interaction adds, for each unit of its value."""
    unobserved_weight: float | None = None
    """For experts: absolute weight of a pair without an interaction, instead of --als.unobserved-ratio."""
    regularization: float | None = None
    """For experts: absolute L2 regularization, instead of --als.mean-penalty."""
    auto: bool = True
    """Choose what is not given; otherwise take a fixed default for each setting."""
    auto_metric: Literal["auto", "sampled", "full"] = "auto"
    """How candidates are compared: by NDCG@10 of a held-out item among 99 `sampled` items, or among all items (`full`);
    `auto`: as the log's own held-out part is ranked, `sampled` without one."""
    auto_trials: int = 8
    """Candidates to compare; those beyond the first 8 are drawn at random."""
    auto_cost: float = 1.0
    """Cost of the choice, in factorizations, about."""
    solver: Literal["auto", "cg", "cholesky"] = "auto"
    """How each row's normal equations are solved. `cholesky`: exactly. `cg`: three steps of preconditioned
    conjugate gradients from the last sweep's vector. `auto`: two such steps in the first two sweeps, then
    one, over-relaxed; the fastest, and mostly to a lower objective."""
    tolerance: float = 0.0
    """Stop one sweep after the objective fell by less than this share; 0 runs all sweeps that --als.sweeps names."""
    seed: int = 0
    """Seed of the initial vectors and of the choice."""


@dataclass(frozen=True, kw_only=True)
class ALSParameters:
    """The parameters of one factorization, absolute: what `ALSConfig` becomes for a log.

    Minimizes  sum_(u,i) c_ui (p_ui - x_u . y_i)^2 + sum_u reg_u |x_u|^2 + sum_i reg_i |y_i|^2
    with p_ui = 1 and c_ui = unobserved_weight + confidence * g_i * value for an interaction, p_ui = 0 and
    c_ui = unobserved_weight elsewhere; g_i = item_scale * n_i ** -item_exponent; reg_u = regularization * (n_u +
    unobserved_weight * num_items) ** frequency_exponent (Rendle et al. 2022), and likewise reg_i. n_u and n_i count
    distinct interactions; num_items and num_users are `used_items` and `used_users` where these are given.
    """

    factors: int = 64
    """Dimension of the vectors."""
    sweeps: int = 15
    """Sweeps; one solves all users and all items once."""
    confidence: float = 8.0
    """Weight that an interaction adds, for each unit of its value."""
    unobserved_weight: float = 1.0
    """Weight of the pairs without an interaction."""
    regularization: float = 60.0
    """L2 regularization."""
    frequency_exponent: float = 0.0
    """0: the same for every row; 1: in proportion to its weight in the loss."""
    item_exponent: float = 0.0
    """Interactions of frequent items weigh less."""
    item_scale: float = 1.0
    """Keeps the mean weight of an interaction, whatever `item_exponent` is."""
    used_users: int | None = None
    """Users with an interaction: ids that nothing uses, such as gaps between ids, do not raise the penalty."""
    used_items: int | None = None
    """Likewise items."""
    solver: Literal["auto", "cg", "cholesky"] = "auto"
    """As in `ALSConfig`."""
    tolerance: float = 0.0
    """As in `ALSConfig`."""
    seed: int = 0
    """Seed of the initial vectors."""


@dataclass(frozen=True, kw_only=True)
class LogisticConfig:
    """Logistic matrix factorization: sigmoid(u.v + b_u + b_v + b), cross-entropy, sampled negatives (CADC's
    own)."""

    factors: int = 64
    """Dimension of the vectors, without the two places that the biases take when they are folded in."""
    epochs: int = 20
    """Passes over the log."""
    learning_rate: float = 0.05
    """Of row-wise Adagrad."""
    weight_decay: float = 0.0
    """L2 on the rows that a step touches."""
    negatives: int = 4
    """Sampled negatives for each positive."""
    seed: int = 0
    """Seed of the initial vectors."""


@dataclass(frozen=True, kw_only=True)
class TablesConfig:
    """Where the embedding tables come from and whether they are trained."""

    strategy: Literal["random", "warm-start", "frozen", "frozen+residual"] = "frozen"
    """`random`: random and trained; `warm-start`: factors, trained on; `frozen`: factors, frozen (CADC);
    `frozen+residual`: frozen factors beside a small trainable table."""
    dim: int = 64
    """Dimension of the tables of `random`; the others take the factors' own."""
    storage: Literal["fp32", "fp16", "int8", "int4"] = "fp32"
    """How frozen rows are stored; `int8` and `int4` with a scale and an offset of each row."""
    residual_dim: int = 16
    """Dimension of the trainable table beside the frozen one."""


@dataclass(frozen=True, kw_only=True)
class TowersConfig:
    """The networks between the tables and the dot product."""

    kind: Literal["mlp", "residual"] = "residual"
    """`mlp`: out = MLP(e); `residual`: out = e exp(gate) + MLP(e), which starts with the factors' own
    ranking."""
    hidden: tuple[int, ...] = (256,)
    """Widths of the hidden layers."""
    dim: int = 64
    """Dimension of the output of `mlp`; `residual` keeps the table's."""
    dropout: float = 0.0
    """Dropout on the hidden layers."""
    penalty: float = 0.0
    """`residual`: weight in the loss of the mean square of what the MLP adds, in units of the table's
    spread."""
    feature_dim: int = 8
    """Dimension of the trainable table of each further categorical feature."""


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """What the towers are trained for."""

    kind: Literal["bce", "softmax"] = "bce"
    """`bce`: cross-entropy of each pair (CADC); `softmax`: sampled softmax with logQ correction."""
    in_batch: bool = False
    """`softmax`: the other rows' positives are candidates too."""
    candidates: int = 0
    """`softmax`: size of the choice that the loss stands for, e.g. 100 for a test with 99 negatives; 0: all
    items."""
    scale: float = 8.0
    """Start of the learned factor between dot product and logit."""
    bias: float = -4.0
    """`bce`: start of the learned offset of the logit."""


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


@dataclass(frozen=True, kw_only=True)
class HashConfig:
    """How to map ids to fewer rows."""

    method: HashMethod = "learned"
    """Hashing method; `recpress.modules.hashing.methods` has the table of methods, README.md a line on each."""
    exclusive_share: float = -1.0
    """Share of the rows that belong to one id each, the most frequent ids (`learned`, `frequency`, `hybrid`).
    Negative: the default of the method."""
    count_exponent: float = 0.5
    """`learned`, `co-cluster`: exponent of the count in an id's weight."""
    rows_per_id: Literal[1, 2] = 1
    """`learned`: rows per id. With 2, an id is the weighted sum of two rows, much closer to the embedding, at the price
    of a larger map and two look-ups (`hashing.two_row`)."""
    iterations: int = 15
    """Passes of the clustering over the ids."""
    seed: int = 0
    """Seed of the hash functions and of the clustering."""
