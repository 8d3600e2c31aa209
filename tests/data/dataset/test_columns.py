import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from recpress.data.dataset.columns import Jagged

LISTS = st.lists(st.lists(st.integers(0, 2**63 - 1), max_size=4), max_size=8)


def jagged(rows: list[list[int]]) -> Jagged:
    offsets = np.concatenate(([0], np.cumsum([len(row) for row in rows], dtype=np.int64)))
    return Jagged(np.array([value for row in rows for value in row], dtype=np.int64), offsets)


def lists(column: Jagged) -> list[list[int]]:
    return [part.tolist() for part in np.split(column.values, column.offsets[1:-1])] if len(column.lengths) else []


@given(LISTS, st.data())
@settings(deadline=None)
def test_rows_of_lists_in_any_order_and_number(rows, data):
    places = data.draw(st.lists(st.integers(0, len(rows) - 1), max_size=10)) if rows else []
    taken = jagged(rows).take(np.array(places, dtype=np.int64))
    assert lists(taken) == [rows[place] for place in places]
    assert taken.offsets[0] == 0


@given(LISTS, st.data())
@settings(deadline=None)
def test_a_slice_of_lists(rows, data):
    first = data.draw(st.integers(0, len(rows)))
    end = data.draw(st.integers(first, len(rows)))
    column = jagged(rows)
    column.values.flags.writeable = False  # as Arrow's are
    part = column.slice(first, end)
    assert lists(part) == rows[first:end]
    assert lists(part.take(np.arange(end - first)[::-1])) == rows[first:end][::-1]
