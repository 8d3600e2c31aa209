import hashlib
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recpress.data.stream.order import EpochOrder

LOGS = [[1], [5], [0, 7, 0], [3, 1, 4, 1, 5, 9, 2, 6], [40], [16] * 12, [1] * 30]


def epoch(order: EpochOrder, world: int) -> list[np.ndarray]:
    """The global batches of an epoch, (rows, 2) each."""
    steps = range(order.num_steps(world))
    return [np.concatenate([order.locate(k, rank, world) for rank in range(world)]) for k in steps]


def everything(counts: list[int]) -> set[tuple[int, int]]:
    return {(group, row) for group, count in enumerate(counts) for row in range(count)}


@pytest.mark.parametrize("counts", LOGS, ids=str)
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_every_row_once_or_dropped_by_the_rule(counts, world):
    for batch, buffer, lanes, shuffle in itertools.product([1, 3, 8], [1, 10, 1000], [1, 3, 8], [True, False]):
        order = EpochOrder(
            np.array(counts), world * batch, seed=3, shuffle=shuffle, buffer_rows=buffer, interleave=lanes
        )
        batches = epoch(order, world)
        rows = [tuple(row) for found in batches for row in found.tolist()]
        tail = sum(counts) % (world * batch)
        assert len(rows) == len(set(rows)) == sum(counts) - tail % world
        assert set(rows) <= everything(counts)
        assert all(len(found) == world * batch for found in batches[: order.full_steps])
        assert len(batches) == sum(counts) // (world * batch) + (tail >= world)
        for step in range(len(batches)):
            sizes = {len(order.locate(step, rank, world)) for rank in range(world)}
            assert sizes == {order.step_rows(step, world)}


@given(
    st.lists(st.integers(0, 60), min_size=1, max_size=12).filter(any),
    st.sampled_from([4, 12, 24]),
    st.integers(1, 200),
    st.integers(1, 9),
    st.booleans(),
    st.integers(0, 2**40),
    st.integers(0, 3),
)
@settings(max_examples=60, deadline=None)
def test_rows_of_a_step_depend_on_the_global_batch_alone(counts, global_batch, buffer, lanes, shuffle, seed, number):
    order = EpochOrder(np.array(counts), global_batch, seed, number, shuffle, buffer, lanes)
    alone = epoch(order, 1)
    for world in (2, 4):
        for step, found in enumerate(epoch(order, world)):
            if step < order.full_steps:
                np.testing.assert_array_equal(found, alone[step])
            else:  # the tail: a few rows may have been dropped
                assert set(map(tuple, found.tolist())) <= set(map(tuple, alone[step].tolist()))
                assert len(alone[step]) - len(found) < world


@given(
    st.lists(st.integers(0, 60), min_size=1, max_size=12).filter(any),
    st.integers(1, 5),
    st.integers(1, 6),
    st.integers(1, 100),
    st.integers(1, 9),
    st.booleans(),
    st.data(),
)
@settings(max_examples=100, deadline=None)
def test_visits_bring_every_row_that_a_rank_needs_in_time(counts, world, batch, buffer, lanes, shuffle, data):
    order = EpochOrder(np.array(counts), world * batch, 5, 1, shuffle, buffer, lanes)
    start = data.draw(st.integers(0, order.num_steps(world)))
    rank = data.draw(st.integers(0, world - 1))
    reads = order.reads(rank, world, start)
    assert len({read.group for read in reads}) == len(reads)
    assert [read.step for read in reads] == sorted(read.step for read in reads)
    first_seen = {
        (read.group, row): read.step
        for read in reads
        for segment in read.segments
        for row in range(segment.first, segment.first + segment.count)
    }
    for step in range(start, order.num_steps(world)):
        slices = order.slices(step, rank, world)
        assert sum(end - first for _, first, end in slices) == order.step_rows(step, world)
        for row in order.locate(step, rank, world).tolist():
            assert first_seen[tuple(row)] <= step
    # Blocks are complete: the consumer waits for complete windows.
    filled: dict[tuple[int, int], int] = {}
    for read in reads:
        for segment in read.segments:
            filled[segment.lane, segment.window] = filled.get((segment.lane, segment.window), 0) + segment.count
    for place, count in filled.items():
        low, high = order.block_bounds(*place)
        assert count == high - low


def test_epochs_and_seeds_give_other_orders_of_the_same_rows():
    counts = np.array([50, 60, 70])
    orders = [EpochOrder(counts, 10, seed, number) for seed in (0, 1) for number in (0, 1)]
    flat = [np.concatenate(epoch(order, 1)) for order in orders]
    for one, other in itertools.combinations(flat, 2):
        assert (one != other).any(axis=1).mean() > 0.5
        assert set(map(tuple, one.tolist())) == set(map(tuple, other.tolist()))
    np.testing.assert_array_equal(flat[0], np.concatenate(epoch(EpochOrder(counts, 10, 0, 0), 1)))


def test_unshuffled_is_the_order_of_the_files():
    order = EpochOrder(np.array([3, 0, 4]), 4, shuffle=False)
    rows = np.concatenate(epoch(order, 2)).tolist()
    assert rows == [
        [0, 0],
        [0, 1],
        [0, 2],
        [2, 0],
        [2, 1],
        [2, 2],
    ]  # the seventh cannot be dealt to two ranks


def test_one_buffer_is_a_uniform_permutation():
    """Over many epochs each row is at each place equally often (chi square, five standard deviations)."""
    size, epochs = 12, 3000
    seen = np.zeros((size, size))
    for number in range(epochs):
        rows = np.concatenate(epoch(EpochOrder(np.array([size]), 4, 0, number), 1))[:, 1]
        seen[np.arange(size), rows] += 1
    expected = epochs / size
    freedom = (size - 1) ** 2
    chi = ((seen - expected) ** 2 / expected).sum()
    assert abs(chi - freedom) < 5 * np.sqrt(2 * freedom)


def test_batches_mix_the_lanes_evenly():
    """Sixteen equal row groups in eight lanes: each full batch has the same number of rows of each lane."""
    order = EpochOrder(np.full(16, 100), 80, seed=1, buffer_rows=400)
    for step, found in enumerate(epoch(order, 1)[: order.full_steps]):
        assert len(np.unique(found[:, 0])) >= 8, step


@pytest.mark.parametrize("world", [2, 4, 8])
def test_ranks_share_the_decoding(world):
    """64 row groups, 8 lanes: beyond the groups at the cuts between ranks no group is decoded twice."""
    order = EpochOrder(np.full(64, 997), 8 * 16, seed=2, buffer_rows=2000, interleave=8)
    decoded = [len(order.reads(rank, world)) for rank in range(world)]
    assert sum(decoded) <= 64 + world - 1
    assert max(decoded) <= 64 / world + 2


def test_resume_decodes_only_what_is_left():
    order = EpochOrder(np.full(40, 100), 100, seed=2, buffer_rows=200, interleave=4)
    left = [len(order.reads(0, 1, start)) for start in (0, 20, 36, 40)]
    assert left[0] == 40
    assert 20 <= left[1] <= 28
    assert left[2] <= 12
    assert left[3] == 0


def test_known_order():
    """Frozen: where this changes, a run that resumes from an older checkpoint sees other rows."""
    order = EpochOrder(np.array([4, 3]), 2, seed=0, epoch=1)
    assert np.concatenate(epoch(order, 1)).tolist() == [
        [1, 0],
        [0, 0],
        [1, 1],
        [0, 1],
        [1, 2],
        [0, 2],
        [0, 3],
    ]
    large = EpochOrder(np.array([3000, 0, 500, 40_000]), 64, seed=3, epoch=2, buffer_rows=8192, interleave=4)
    rows = np.concatenate([large.locate(step, 1, 2) for step in (0, 7, 300, large.num_steps(2) - 1)])
    assert hashlib.sha256(rows.tobytes()).hexdigest()[:16] == "4521dd1e13f611ee"
