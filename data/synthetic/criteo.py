"""A synthetic log with the columns of Criteo Kaggle: a label, 13 numbers, 26 categorical features; no user, no item.

The planted structure is similarity of ids. The ids of each feature are in groups, far fewer than ids; the latent vector
of an id is that of its group plus a small individual part, and the label depends on ids only through these vectors. So
ids of one group can share an embedding row at little loss, and ids of two groups cannot:

    logit = offset + effects * sum_f w_f x_f0 + interactions * c sum_(f<g) w_f w_g <x_f, x_g>
            + dense * sum_j a_j n_j + noise * e

where x_f0 is the first number of the latent vector of the row's id of feature f and <x_f, x_g> the product of the
others (a factorization machine, Rendle 2010); w and a have unit norm, w_f grows with the logarithm of the feature's
number of ids, c makes the sum of unit variance, and all else is standard normal. So the options are the standard
deviations of the parts of the logit.

How often an id is accessed is a power law of its rank, and its number a random permutation of the ranks: the number
is unrelated to frequency and group. Row i of a part is a function of (config, part, i); memory is O(ids).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow as pa
from tqdm import tqdm

from recpress.data.config import Schema, SynthCriteoConfig
from recpress.data.dataset import artifact
from recpress.data.dataset.log import KIND
from recpress.data.dataset.writer import LogWriter
from recpress.data.errors import InputError
from recpress.data.ingest.formats import CATEGORIES, INTS
from recpress.data.seeds import generator
from recpress.data.synthetic.tastes import search

SIZES = (
    *(1460, 583, 10131227, 2202608, 305, 24, 12517, 633, 3, 93145, 5683, 8351593, 3194),
    *(27, 14992, 5461306, 10, 5652, 2173, 4, 7046547, 18, 15, 286181, 105, 142572),
)
"""Distinct values of C1 to C26 in Criteo Kaggle, as facebookresearch/dlrm prints them."""
BLOCK = 1 << 14  # rows that are drawn from one generator
MISSING = 0.1  # share of the numbers that are missing


def synth_criteo(config: SynthCriteoConfig, out: str | Path, *, overwrite: bool = False) -> str | Path:
    """Writes the synthetic log to the folder `out`, with the vocabularies that `ingest` would write, and returns it.

    Raises InputError if an option is out of range.
    """
    made = SyntheticCriteo(config)
    counts = [np.zeros(size, dtype=np.int64) for size in made.sizes]
    meta: dict[str, object] = {}
    with (
        artifact.writing(out, KIND, meta, overwrite=overwrite) as tmp,
        LogWriter(tmp, config.layout) as writer,
        tqdm(total=config.rows + config.held_out, unit=" rows", unit_scale=True, disable=None, desc="synth") as bar,
    ):
        for part, rows in (("train", config.rows), ("test", config.held_out)):
            for first in range(0, rows, BLOCK):
                label, floats, ids = made.rows(part, first, min(first + BLOCK, rows))
                writer.part(part).write(_table(label, floats, ids))
                if part == "train":
                    for count, column in zip(counts, ids.T, strict=True):
                        np.add.at(count, column, 1)
                bar.update(len(label))
        features = {}
        for name, count in zip(CATEGORIES, counts, strict=True):
            file = f"vocabulary/feature-{name}.parquet"
            raw = pa.array(np.arange(len(count))).cast(pa.large_string())
            writer.table(file, pa.table({"raw": raw, "count": count}))
            features[name] = {"num_ids": len(count), "vocabulary": file}
        schema = Schema(user="", item="", label="label", categorical=tuple(CATEGORIES), floats=tuple(INTS))
        meta |= writer.manifest(
            schema, 0, 0, vocabularies={}, features=features, made_by="synth-criteo", config=asdict(config)
        )
    return artifact.place(out)


class SyntheticCriteo:
    """The rows of a synthetic log, by position. Construction takes O(ids)."""

    def __init__(self, config: SynthCriteoConfig) -> None:
        _check(config)
        self.config = config
        self.sizes = feature_sizes(config.ids)
        self._ends, self._order, self._latent = [], [], []  # of each feature, by rank
        self.groups: list[np.ndarray] = []
        """Of each feature, the group of each id: (ids,) int32."""
        for name, size in zip(CATEGORIES, self.sizes, strict=True):
            rng = generator(config.seed, "criteo", name)
            self._ends.append(np.cumsum(np.arange(1, size + 1) ** -config.skew))
            order = rng.permutation(size).astype(np.int32)
            self._order.append(order)
            group = rng.integers(0, min(config.groups, size), size, dtype=np.int32)
            own, shared = (
                rng.standard_normal((n, 1 + config.latent), dtype=np.float32) for n in (size, min(config.groups, size))
            )
            self._latent.append(np.sqrt(1 - config.deviation**2) * shared[group] + config.deviation * own)
            self.groups.append(np.empty(size, dtype=np.int32))
            self.groups[-1][order] = group
        weight = np.log(self.sizes)
        self._weight = weight / np.linalg.norm(weight)
        pairs = (1 - (self._weight**4).sum()) / 2  # sum of w_f^2 w_g^2 over the pairs of features
        self._pair_scale = 1 / np.sqrt(config.latent * pairs)
        rng = generator(config.seed, "criteo", "numbers")
        self._slopes = _unit(rng.standard_normal(len(INTS)))
        self._center, self._spread = rng.uniform(0, 4, len(INTS)), rng.uniform(0.5, 2, len(INTS))
        self._offset = 0.0
        self._offset = self._offset_for(config.positives)

    def rows(self, part: str, first: int, last: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Rows [first, last) of a part: label (n,) float32, numbers (n, 13) float32, ids (n, 26) int64."""
        blocks = [self._block(part, block) for block in range(first // BLOCK, -(-last // BLOCK))]
        skip = first - first // BLOCK * BLOCK
        label, floats, ids, _ = (
            np.concatenate(parts)[skip : skip + last - first] for parts in zip(*blocks, strict=True)
        )
        return label, floats, ids

    def probabilities(self, part: str, first: int, last: int) -> np.ndarray:
        """P(label = 1) of the same rows given their ids, numbers and noise, (n,): no model can predict better."""
        blocks = [self._block(part, block)[3] for block in range(first // BLOCK, -(-last // BLOCK))]
        skip = first - first // BLOCK * BLOCK
        return np.concatenate(blocks)[skip : skip + last - first]

    def _block(self, part: str, block: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        config, rng = self.config, generator(self.config.seed, "criteo", part, block)
        ids = np.empty((BLOCK, len(SIZES)), dtype=np.int64)
        total = np.zeros((BLOCK, 1 + config.latent))
        squares = np.zeros(BLOCK)
        for f, (ends, order, latent) in enumerate(zip(self._ends, self._order, self._latent, strict=True)):
            rank = np.minimum(search(ends, rng.random(BLOCK) * ends[-1]), len(ends) - 1)
            ids[:, f] = order[rank]
            vector = self._weight[f] * latent[rank]
            total += vector
            squares += (vector[:, 1:] ** 2).sum(1)
        normal = rng.standard_normal((BLOCK, len(INTS)))
        pairs = self._pair_scale * ((total[:, 1:] ** 2).sum(1) - squares) / 2
        logit = self._offset + config.effects * total[:, 0] + config.interactions * pairs
        logit += config.dense * normal @ self._slopes + config.noise * rng.standard_normal(BLOCK)
        probability = 1 / (1 + np.exp(-logit))
        label = (rng.random(BLOCK) < probability).astype(np.float32)
        floats = np.floor(np.exp(self._center + self._spread * normal)).astype(np.float32)
        floats[rng.random(floats.shape) < MISSING] = np.nan
        return label, floats, ids, probability

    def _offset_for(self, positives: float) -> float:
        """The offset with which this share of the labels is 1, by bisection on two separate blocks."""
        probability = np.concatenate([self._block("offset", block)[3] for block in range(2)])
        logit = np.log(probability) - np.log1p(-probability)
        low, high = -30.0, 30.0
        for _ in range(40):
            middle = (low + high) / 2
            low, high = (middle, high) if (1 / (1 + np.exp(-logit - middle))).mean() < positives else (low, middle)
        return low


def feature_sizes(ids: int) -> tuple[int, ...]:
    """Number of ids of each feature: max(3, size ** a) of Criteo's sizes, a such that they sum to about `ids`."""
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(_shrunk(middle)) < ids else (low, middle)
    return _shrunk(high)


def _shrunk(power: float) -> tuple[int, ...]:
    return tuple(max(3, round(size**power)) for size in SIZES)


def _unit(vector: np.ndarray) -> np.ndarray:
    return vector / np.linalg.norm(vector)


def _table(label: np.ndarray, floats: np.ndarray, ids: np.ndarray) -> pa.Table:
    columns = {"label": label} | dict(zip(CATEGORIES, _columns(ids), strict=True))
    return pa.table(columns | dict(zip(INTS, _columns(floats), strict=True)))


def _columns(matrix: np.ndarray) -> Iterator[np.ndarray]:
    return (np.ascontiguousarray(column) for column in matrix.T)


def _check(config: SynthCriteoConfig) -> None:
    counts = {"rows": config.rows, "test_rows": config.held_out, "groups": config.groups, "latent": config.latent}
    for name, count in counts.items():
        if count < 1:
            raise InputError(f"synth-criteo: {name} is {count}; expected at least 1")
    for name in ("skew", "effects", "interactions", "dense", "noise"):
        if not 0 <= getattr(config, name) < np.inf:
            raise InputError(f"synth-criteo: {name} is {getattr(config, name)}; expected a number >= 0")
    if not 0 <= config.deviation <= 1:
        raise InputError(f"synth-criteo: deviation is {config.deviation}; expected a number in [0, 1]")
    if not 0 < config.positives < 1:
        raise InputError(f"synth-criteo: positives is {config.positives}; expected a number in (0, 1)")
    if not 3 * len(SIZES) <= config.ids <= sum(SIZES):
        raise InputError(f"synth-criteo: ids is {config.ids}; expected {3 * len(SIZES)} to {sum(SIZES)}, Criteo's own")
