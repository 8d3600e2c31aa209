"""A synthetic log: planted tastes, power-law activity and popularity; any size, written as a stream.

Items fall into `tastes` groups of equal size; within a group their popularity follows a power law. A user has
a main taste and some further ones in a fixed relation to it, with geometric weights, and interacts in each taste
with items about in proportion to their popularity. So the expected log is a matrix of rank
`tastes`, which a factorization finds and popularity alone does not.

Every row is a pure function of (config, position in the log). A random permutation (a Feistel network) maps the
position to a pair (user, ordinal among the user's items), and systematic sampling without replacement maps the ordinal
to an item. No pair occurs twice, the held-out item of a user is an ordinal that train skips, and memory is
O(users + items) for any number of rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow as pa
from tqdm import tqdm

from recpress.data.config import Schema, SynthConfig
from recpress.data.dataset import artifact
from recpress.data.dataset.log import KIND
from recpress.data.dataset.writer import LogWriter
from recpress.data.errors import InputError
from recpress.data.negatives.table import draw_unseen, negatives_table
from recpress.data.seeds import generator
from recpress.data.synthetic.tastes import Permutation, Tastes, search

CHUNK = 1 << 14  # rows made at once: their arrays stay in the cache


def synth(config: SynthConfig, out: str | Path, *, overwrite: bool = False) -> str | Path:
    """Writes the synthetic log to the folder `out` and returns it.

    Raises InputError if the sizes are inconsistent.
    """
    made = SyntheticInteractions(config)
    meta: dict[str, object] = {}
    with (
        artifact.writing(out, KIND, meta, overwrite=overwrite) as tmp,
        LogWriter(tmp, config.layout) as writer,
    ):
        with tqdm(total=config.rows, unit=" rows", unit_scale=True, disable=None, desc="synth") as bar:
            for start in range(0, config.rows, CHUNK):
                stop = min(start + CHUNK, config.rows)
                writer.part("train").write(made.train_rows(start, stop))
                bar.update(stop - start)
        for test, negatives in made.held_out():
            writer.part("test").write(test)
            writer.part("test_negatives").write(negatives)
        writer.table("users.parquet", made.user_features())
        writer.table("items.parquet", made.item_features())
        meta |= writer.manifest(Schema(time="time"), config.users, config.items, made_by="synth", config=asdict(config))
    return artifact.place(out)


class SyntheticInteractions:
    """The rows of a synthetic log, by position. Memory: O(users + items)."""

    def __init__(self, config: SynthConfig) -> None:
        _check(config)
        self.config = config
        self._tastes = Tastes(config)
        self.user_rows = _activity(config, self._tastes.most_rows)  # (users,) int64, rows of each user in train
        self._ends = np.cumsum(self.user_rows)
        self._permutation = Permutation(config.rows, config.seed)
        # Held-out users have one item more than rows; the ordinal that train skips:
        users = np.flatnonzero(self.user_rows > 0)[: config.held_out_users]
        draws = generator(config.seed, "left out").random(len(users))
        self.held_out_users = users
        self._left_out = np.full(config.users, np.iinfo(np.int64).max)
        self._left_out[users] = (draws * (self.user_rows[users] + 1)).astype(np.int64)
        self._id_type = pa.int32() if max(config.users, config.items) < 2**31 else pa.int64()

    def train_rows(self, start: int, stop: int) -> pa.Table:
        """Rows [start, stop) of train: user_id, item_id, time (seconds, ascending)."""
        slots = self._permutation(np.arange(start, stop, dtype=np.uint64))
        users = search(self._ends, slots)
        ordinals = slots - (self._ends[users] - self.user_rows[users])
        left_out = self._left_out[users]
        ordinals += ordinals >= left_out
        items = self._tastes.items_of(users, ordinals, self._num_items(users))
        step = self.config.days * 86400 / max(self.config.rows, 1)
        times = self.config.start_time + (np.arange(start, stop) * step).astype(np.int64)
        return self._table(users, items, times)

    def held_out(self, chunk: int = 4096) -> Iterator[tuple[pa.Table, pa.Table]]:
        """The held-out pairs, and for each items without an interaction of the user."""
        later = self.config.start_time + self.config.days * 86400
        rng = generator(self.config.seed, "negatives")
        for start in range(0, len(self.held_out_users), chunk):
            users = self.held_out_users[start : start + chunk]
            left_out = self._left_out[users]
            items = self._tastes.items_of(users, left_out, self._num_items(users))
            lengths = self._num_items(users)
            owners = np.repeat(np.arange(len(users)), lengths)
            ordinals = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
            met = self._tastes.items_of(users[owners], ordinals, lengths[owners])
            negatives = draw_unseen(rng, len(users), self.config.items, self.config.negatives, owners, met)
            times = later + np.arange(start, start + len(users))
            yield self._table(users, items, times), negatives_table(users, items, negatives, self._id_type)

    def user_features(self) -> pa.Table:
        """Side table of the users: an age band, a country that is determined by the main taste for half of them."""
        rng = generator(self.config.seed, "user features")
        main, _ = self._tastes.of_users(np.arange(self.config.users))
        country = np.where(rng.random(self.config.users) < 0.5, main % 50, rng.integers(0, 50, self.config.users))
        age = np.clip(rng.normal(3 + main % 3 - 1, 1.2), 0, 6)
        return pa.table({"age": pa.array(age, pa.int32(), safe=False), "country": pa.array(country, pa.int32())})

    def item_features(self) -> pa.Table:
        """Side table of the items: the taste as a category for four of five, a list of one to three genres, a
        price."""
        rng = generator(self.config.seed, "item features")
        items, tastes = self.config.items, self.config.tastes
        taste = self._tastes.of_items()
        category = np.where(rng.random(items) < 0.8, taste, rng.integers(0, tastes, items))
        lengths = rng.integers(1, 4, items)
        offsets = np.concatenate(([0], np.cumsum(lengths)))
        owners = np.repeat(np.arange(items), lengths)
        genres = (taste[owners] // 2 + 5 * (np.arange(offsets[-1]) - offsets[owners])) % 18
        price = np.exp(rng.normal(2.5 + 0.1 * (taste % 10), 0.6))
        return pa.table(
            {
                "category": pa.array(category, pa.int32()),
                "genres": pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(genres, pa.int32())),
                "price": pa.array(price, pa.float32()),
            }
        )

    def _num_items(self, users: np.ndarray) -> np.ndarray:
        """Items of each user, with the held-out one."""
        return self.user_rows[users] + (self._left_out[users] != np.iinfo(np.int64).max)

    def _table(self, users: np.ndarray, items: np.ndarray, times: np.ndarray) -> pa.Table:
        columns = [pa.array(users).cast(self._id_type), pa.array(items).cast(self._id_type), pa.array(times)]
        return pa.table(columns, names=["user_id", "item_id", "time"])


def _activity(config: SynthConfig, most: int) -> np.ndarray:
    """Rows of each user, (users,) int64: a power law over users in random order, between `least` and
    `most`."""
    rank = generator(config.seed, "users").permutation(config.users)
    weight = (rank + 1.0) ** -config.user_skew
    least = min(5, config.rows // config.users)
    rows = np.full(config.users, float(least))
    spare = config.rows - rows.sum()
    while spare > 0.5:  # rows above the limit of the most active users go to the others
        open_ = rows < most
        rows[open_] += spare * weight[open_] / weight[open_].sum()
        spare = np.maximum(rows - most, 0.0).sum()
        rows = np.minimum(rows, most)
    ends = np.rint(np.cumsum(rows)).astype(np.int64)
    ends[-1] = config.rows
    return np.diff(ends, prepend=0)


def _check(config: SynthConfig) -> None:
    for name in ("users", "items", "rows", "tastes", "tastes_per_user"):
        if getattr(config, name) < 1:
            raise InputError(f"synth: {name} is {getattr(config, name)}; expected at least 1")
    for name in ("held_out_users", "negatives", "days", "user_skew", "item_skew", "taste_skew"):
        if not getattr(config, name) >= 0:
            raise InputError(f"synth: {name} is {getattr(config, name)}; expected at least 0")
    if not 0 < config.taste_decay <= 1:
        raise InputError(f"synth: taste_decay is {config.taste_decay}; expected a number in (0, 1]")
    if config.items < 6 * config.tastes:
        raise InputError(f"synth: {config.items} items for {config.tastes} tastes; expected at least 6 per taste")
    most = (config.items // config.tastes) * min(config.tastes_per_user, config.tastes) // 3 - 1
    if config.rows > config.users * most or config.rows < config.users:
        raise InputError(
            f"synth: {config.rows} rows; expected {config.users} to {config.users * most}: no user has an "
            f"item twice, and each has at most a third of the items of its tastes ({most})"
        )
    if config.held_out_users and config.items - most - 1 < config.negatives:
        raise InputError(
            f"synth: {config.negatives} negatives; at most {config.items - most - 1} items are without an interaction"
        )
