import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recpress.data.config import SampleConfig
from recpress.data.errors import InputError
from recpress.data.sampling.bernoulli import membership, num_members

RATES = [1e-9, 0.001, 0.1, 0.5, 0.9, 0.999999, 1.0]


@given(
    st.integers(-5, 2**63 - 1),
    st.sampled_from(RATES),
    st.integers(0, 10**6),
    st.integers(0, 10**4),
    st.integers(0, 3000),
)
def test_sorted_unique_in_range(seed, rate, file, group, rows):
    members = membership(seed, rate, file, group, rows)
    assert members.dtype == np.int64
    assert (np.diff(members) > 0).all()
    assert not len(members) or (members[0] >= 0 and members[-1] < rows)
    if rate == 1.0:
        assert len(members) == rows


@given(st.integers(0, 100), st.sampled_from(RATES), st.integers(0, 2000), st.integers(0, 2000))
def test_membership_of_a_row_does_not_depend_on_the_rows_after_it(seed, rate, rows, more):
    shorter, longer = membership(seed, rate, 1, 2, rows), membership(seed, rate, 1, 2, rows + more)
    np.testing.assert_array_equal(shorter, longer[longer < rows])


@pytest.mark.parametrize("rate", [0.001, 0.1, 0.5, 0.9])
def test_each_row_is_a_bernoulli_trial(rate):
    """Mean, spread over row groups, and gaps agree with Bernoulli(rate) within five standard errors."""
    rows, groups = 20_000, 200
    found = [membership(7, rate, group // 20, group % 20, rows) for group in range(groups)]
    counts = np.array([len(members) for members in found])
    deviation = math.sqrt(rows * rate * (1 - rate))
    assert abs(counts.mean() - rows * rate) < 5 * deviation / math.sqrt(groups)
    assert abs(counts.std() / deviation - 1) < 5 / math.sqrt(2 * groups)
    hits = np.zeros(rows)
    for members in found:
        hits[members] += 1
    # Sum of squared deviations over rows: chi square with `rows` degrees of freedom.
    chi = ((hits - groups * rate) ** 2 / (groups * rate * (1 - rate))).sum()
    assert abs(chi - rows) < 5 * math.sqrt(2 * rows) * (1 + 1 / math.sqrt(groups * rate))
    gaps = np.concatenate([np.diff(members) for members in found])
    assert abs((gaps == 1).mean() - rate) < 5 * math.sqrt(rate * (1 - rate) / len(gaps))


def test_neighbours_in_seed_file_and_group_are_independent():
    rows, rate = 200_000, 0.1
    places = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 1, 1)]
    masks = []
    for seed, file, group in places:
        mask = np.zeros(rows)
        mask[membership(seed, rate, file, group, rows)] = 1
        masks.append(mask)
    correlation = np.corrcoef(masks) - np.eye(len(places))
    assert np.abs(correlation).max() < 5 / math.sqrt(rows)


def test_known_members():
    """Frozen: a change of these numbers changes every sample that was ever drawn."""
    assert membership(0, 0.1, 0, 0, 60).tolist() == [0, 7, 13, 18, 33, 42, 49, 55]
    assert membership(np.int64(0), 0.1, np.int32(0), 0, 60).tolist() == membership(0, 0.1, 0, 0, 60).tolist()


@pytest.mark.parametrize("rate", [0.0, -0.1, 1.0000001, float("nan"), float("inf")])
def test_rate_outside_the_unit_interval_is_refused(rate):
    with pytest.raises(InputError, match=r"sample rate .* \(0, 1\]"):
        membership(0, rate, 0, 0, 10)
    with pytest.raises(InputError, match=r"sample\.rate"):
        SampleConfig(rate=rate)


@settings(deadline=None)
@given(st.integers(0, 5), st.sampled_from(RATES), st.sampled_from([0, 1, 7, 500, 8192, 40_000]))
def test_the_number_of_members_without_the_members(seed, rate, rows):
    assert num_members(seed, rate, 3, 4, rows) == len(membership(seed, rate, 3, 4, rows))
