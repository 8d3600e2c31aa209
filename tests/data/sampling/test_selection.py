"""The three kinds of samples: the probability of each row, sizes, independence, complements, and what is read."""

import math
from fractions import Fraction

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recpress.data.config import SampleConfig, Schema
from recpress.data.dataset.log import open_log
from recpress.data.errors import InputError
from recpress.data.sampling.bernoulli import membership
from recpress.data.sampling.block_sample import BlockSample, drawn
from recpress.data.sampling.scan import iter_columns
from recpress.data.sampling.selection import Selection
from recpress.data.sampling.user_sample import Marker

KINDS = ("rows", "block", "user")
SIZES = (7, 90, 1, 30, 30, 42)  # of row groups, 200 rows in all
RATES = st.sampled_from([1e-6, 0.01, 0.1, 1 / 3, 0.5, 0.75, 0.999])
USERS = np.random.default_rng(5).zipf(1.4, sum(SIZES)) % 40


@pytest.fixture(autouse=True)
def _cache(monkeypatch, tmp_path):
    monkeypatch.setenv("RECPRESS_CACHE", str(tmp_path / "cache"))


def write_log(folder, users, sizes, **more):
    folder.mkdir(exist_ok=True)
    table = pa.table({"user_id": users, "item_id": np.arange(len(users)) % 97, **more})
    with pq.ParquetWriter(folder / "train.parquet", table.schema) as writer:
        for first, size in zip(np.cumsum([0, *sizes]), sizes, strict=False):
            writer.write_table(table.slice(first, size))
    return open_log(folder)


def mask(kind: str, rate: float, seed: int, sizes=SIZES, users=USERS) -> np.ndarray:
    """Whether each row is a member, (rows,) bool, from the definitions alone."""
    if kind == "user":
        return Marker(rate, seed).mark(users)
    block = BlockSample(sizes, rate, seed)
    parts = []
    for group, size in enumerate(sizes):
        members = block.members(group) if kind == "block" else membership(seed, rate, 0, group, size)
        parts.append(np.isin(np.arange(size), np.arange(size) if members is None else members))
    return np.concatenate(parts)


@pytest.mark.parametrize("rate", [0.1, 0.35])
@pytest.mark.parametrize("kind", KINDS)
def test_each_row_is_a_member_with_the_same_probability(kind, rate):
    """Over 2,000 seeds: each row within five standard errors, whatever its row group's size and its user."""
    seeds = 2000
    hits = np.sum([mask(kind, rate, seed) for seed in range(seeds)], axis=0)
    z = (hits - seeds * rate) / math.sqrt(seeds * rate * (1 - rate))
    assert np.abs(z).max() < 5
    assert abs((z**2).mean() - 1) < 0.75  # and not all of them nearer than chance allows


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 400), min_size=1, max_size=30), RATES, st.integers(0, 99))
def test_a_block_sample_has_the_rounded_size_and_at_most_one_part_of_a_row_group(sizes, rate, seed):
    counts = drawn(sizes, rate, seed)
    assert counts.sum() == round(rate * sum(sizes))
    assert sum(0 < count < size for count, size in zip(counts, sizes, strict=True)) <= 1
    block = BlockSample(sizes, rate, seed)
    for group, size in enumerate(sizes):
        members = block.members(group)
        members = np.arange(size) if members is None else members
        assert len(members) == counts[group]
        assert (np.diff(members) > 0).all()
        assert not len(members) or (members[0] >= 0 and members[-1] < size)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 12), min_size=1, max_size=300), RATES, st.integers(0, 99))
def test_a_user_has_the_rounded_share_of_its_rows(users, rate, seed):
    users = np.array(users)
    marks = Marker(rate, seed, 3).mark(users)
    for user in np.unique(users):
        share = Fraction(rate) * int((users == user).sum())
        assert math.floor(share) <= marks[users == user].sum() <= math.ceil(share)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 2**40), min_size=1, max_size=200), st.lists(st.integers(0, 200), max_size=4))
def test_members_do_not_depend_on_how_the_rows_are_cut(users, cuts):
    users = np.array(users) % (1 << 20) + 60_000  # on both sides of 16 bits
    whole, pieces = Marker(0.3, 1).mark(users), Marker(0.3, 1, 100_000)
    parts = [pieces.mark(part) for part in np.split(users, sorted(cuts))]
    np.testing.assert_array_equal(np.concatenate(parts), whole)


def test_members_are_what_a_plain_loop_finds():
    """The definition, row by row: a member where the sum of the user's start and rates passes an integer."""
    rate, users = 0.3, USERS
    starts = [Fraction(int(phase), 2**64) for phase in Marker(rate, 9, 40)._phases]
    for user, found in zip(users.tolist(), Marker(rate, 9).mark(users).tolist(), strict=True):
        after = starts[user] + Fraction(rate)
        assert found == (math.floor(after) > math.floor(starts[user]))
        starts[user] = after


def test_known_members():
    """Frozen: a change of these numbers changes every sample that was ever drawn."""
    assert np.flatnonzero(Marker(0.1, 0).mark(USERS[:60])).tolist() == [5, 11, 15, 22, 48]
    assert drawn(SIZES, 0.5, 0).tolist() == [7, 32, 1, 30, 30, 0]


def test_users_are_independent_and_so_are_row_groups_but_for_the_sum():
    seeds, rate = 2000, 0.2
    users = np.arange(12)
    found = np.array([Marker(rate, seed).mark(users) for seed in range(seeds)])
    correlation = np.corrcoef(found.T) - np.eye(12)
    assert np.abs(correlation).max() < 5 / math.sqrt(seeds)
    groups = np.array([drawn([10] * 12, 0.25, seed) > 0 for seed in range(seeds)])
    pairs = (groups.T.astype(int) @ groups) / seeds  # two of three row groups of twelve: 3 * 2 / (12 * 11)
    expected = np.where(np.eye(12, dtype=bool), 3 / 12, 6 / 132)
    assert np.abs(pairs - expected).max() < 5 * math.sqrt(0.25 * 0.75 / seeds)


@pytest.mark.parametrize("kind", KINDS)
def test_on_a_shuffled_log_users_and_items_are_drawn_as_from_all_rows(kind):
    """Counts in a sample of 20 % of 40,000 shuffled rows: chi square with the variance of sampling without
    replacement; of `user` smaller for users, since it is stratified by them."""
    rng, rate = np.random.default_rng(3), 0.2
    users = rng.permutation(np.repeat(np.arange(200), 200))
    items = (rng.pareto(1.2, 40_000) * 20).astype(int).clip(max=149)
    for values in (users, items):
        counts = np.bincount(values)
        chi = []
        for seed in range(12):
            found = np.bincount(values[mask(kind, rate, seed, [400] * 100, users)], minlength=len(counts))
            chi.append(((found - rate * counts) ** 2 / (rate * (1 - rate) * counts)).sum() / len(counts))
        near = 5 * math.sqrt(2 / (len(chi) * len(counts)))
        if kind == "user" and values is users:
            assert max(chi) == 0  # 40 of each user's 200 rows
        else:
            assert abs(np.mean(chi) - 1) < near + 0.02


@pytest.mark.parametrize("rate", [None, 0.02, 0.3, 0.9, 1.0])
@pytest.mark.parametrize("kind", KINDS)
def test_sample_and_complement_split_the_rows(tmp_path, kind, rate):
    log = write_log(tmp_path / "log", USERS, SIZES)
    sample = None if rate is None else SampleConfig(kind=kind, rate=rate, seed=3)
    wanted = np.ones(200, bool) if rate in (None, 1.0) else mask(kind, rate, 3)
    starts = np.cumsum([0, *SIZES])
    for complement in (False, True):
        selection = Selection(log.train, sample, complement)
        found = np.zeros(200, bool)
        for group, size in enumerate(SIZES):
            chosen = selection.of(group)
            assert chosen is None or chosen.dtype == np.int64
            chosen = np.arange(size) if chosen is None else chosen
            assert len(chosen) == selection.counts[group]
            assert len(chosen) == 0 or group in selection.candidates
            found[starts[group] + chosen] = True
        np.testing.assert_array_equal(found, wanted != complement)
        assert selection.num_rows == found.sum()


@pytest.mark.parametrize("world", [1, 2, 3])
def test_only_row_groups_that_are_drawn_are_read(tmp_path, monkeypatch, world):
    """At most rate + one row group of the bytes, by the footer's sizes."""
    sizes = [50] * 40
    log = write_log(tmp_path / "log", np.arange(2000) % 30, sizes)
    read = []
    monkeypatch.setattr(
        type(log.train),
        "read_table",
        lambda rows, group, names, _: read.append(group.group) or _table(rows, group, names),
    )
    sample = SampleConfig(kind="block", rate=0.11)
    for rank in range(world):
        for _ in iter_columns(log.train, ["user_id"], sample=sample, rank=rank, world=world):
            pass
    metadata = log.train.files[0].metadata
    sizes = np.array([metadata.row_group(group).total_byte_size for group in range(40)])
    assert len(read) == len(set(read)) == 5
    assert sizes[read].sum() <= 0.11 * sizes.sum() + sizes.max()


def _table(rows, group, names):
    return pq.ParquetFile(rows.files[group.file].path).read_row_group(group.group, columns=names)


def test_the_column_of_users_is_read_once_and_its_members_are_kept(tmp_path, monkeypatch):
    log = write_log(tmp_path / "log", USERS, SIZES)
    sample = SampleConfig(kind="user", rate=0.3)
    first = Selection(log.train, sample)
    reads = []
    monkeypatch.setattr(type(log.train), "read_table", lambda *_: reads.append(1))
    again = Selection(log.train, sample, complement=True)
    assert not reads
    assert first.num_rows + again.num_rows == 200
    monkeypatch.undo()
    monkeypatch.setenv("RECPRESS_CACHE", str(tmp_path / "cache"))
    other = write_log(tmp_path / "other", USERS[::-1].copy(), SIZES)  # other files are another sample
    np.testing.assert_array_equal(
        np.concatenate([np.isin(np.arange(n), Selection(other.train, sample).of(g)) for g, n in enumerate(SIZES)]),
        mask("user", 0.3, 0, users=USERS[::-1]),
    )


def test_a_log_without_users_is_refused_by_name(tmp_path):
    write_log(tmp_path / "log", USERS, SIZES)
    log = open_log(tmp_path / "log", Schema(user=""), pairs=False)
    with pytest.raises(InputError, match=r"sample\.kind is 'user': expected a log with a column of users"):
        Selection(log.train, SampleConfig(kind="user", rate=0.5))
