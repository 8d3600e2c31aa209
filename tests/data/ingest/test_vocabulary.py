"""Dense ids: by first appearance, exact, and never renumbered."""

from collections import Counter

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recpress.data.errors import InputError
from recpress.data.ingest import vocabulary as module
from recpress.data.ingest.raw_files import RowNumbers
from recpress.data.ingest.vocabulary import Vocabulary

INTS = st.lists(st.lists(st.integers(-(2**63), 2**63 - 1) | st.integers(0, 20), max_size=30), max_size=12)
TEXT = st.lists(st.lists(st.text(max_size=5) | st.text("ab", min_size=60, max_size=140), max_size=20), max_size=12)


def first_appearance(batches):
    return list(dict.fromkeys(value for batch in batches for value in batch))


@pytest.mark.parametrize(("kind", "arrow", "values"), [("int", pa.int64(), INTS), ("string", pa.string(), TEXT)])
def test_numbers_by_first_appearance_and_counts(kind, arrow, values):
    @settings(max_examples=80, deadline=None)
    @given(values, st.integers(0, 12))
    def check(batches, cut):
        """The same as a dict would do; and the same again when it is saved and extended at any point."""
        expected = {raw: dense for dense, raw in enumerate(first_appearance(batches))}
        vocabulary = Vocabulary(kind, "user")
        for number, batch in enumerate(batches):
            if number == cut:
                before = vocabulary.fingerprint()
                vocabulary = Vocabulary.from_table(vocabulary.table(), "user")
                assert not len(vocabulary) or vocabulary.fingerprint() == before
                vocabulary = vocabulary if len(vocabulary) else Vocabulary(kind, "user")
            dense = vocabulary.encode(pa.array(batch, arrow))
            assert dense.tolist() == [expected[raw] for raw in batch]
        table = vocabulary.table()
        assert table.column("raw").to_pylist() == list(expected)
        counts = Counter(raw for batch in batches for raw in batch)
        assert table.column("count").to_pylist() == [counts[raw] for raw in expected]

    check()


def test_strings_that_share_a_key_stay_apart(monkeypatch):
    """The first seeds of the hash give every string of one length the same key."""
    real = module.generator

    def weak(use, seed):
        if seed >= 2:
            return real(use, seed)

        class Constant:
            def integers(self, low, high, shape, dtype):
                tables = real(use, seed).integers(low, high, shape, dtype=dtype)
                tables[0] = 5  # the keys; the second hash stays good
                return tables

        return Constant()

    monkeypatch.setattr(module, "generator", weak)
    vocabulary = Vocabulary("string", "user")
    assert vocabulary.encode(pa.array(["a"])).tolist() == [0]
    assert vocabulary.encode(pa.array(["b", "a"])).tolist() == [1, 0]  # meets a known key
    assert vocabulary.encode(pa.array(["c", "d", "a"])).tolist() == [2, 3, 0]
    fresh = Vocabulary("string", "user")
    assert fresh.encode(pa.array(["x", "y", "x"])).tolist() == [0, 1, 0]  # two new ones at once


def test_many_ids_in_many_batches():
    rng = np.random.default_rng(0)
    vocabulary, seen = Vocabulary("int", "item"), {}
    for _ in range(30):
        raw = rng.integers(0, 5000, 2000) * 1_000_003
        dense = vocabulary.encode(pa.array(raw))
        for value, number in zip(raw.tolist(), dense.tolist(), strict=True):
            assert seen.setdefault(value, number) == number
    assert len(seen) == len(vocabulary) == len(set(seen.values()))
    assert len(vocabulary._runs) < 10


def test_looking_up_without_growing():
    vocabulary = Vocabulary("string", "item")
    vocabulary.encode(pa.array(["a", "b"]))
    assert vocabulary.encode(pa.array(["b", "zz", "a"]), grow=False).tolist() == [1, -1, 0]
    assert len(vocabulary) == 2
    assert vocabulary.counts.tolist() == [1, 1]


def test_fingerprint_is_of_the_order():
    def of(*values):
        vocabulary = Vocabulary("string", "x")
        vocabulary.encode(pa.array(values))
        return vocabulary.fingerprint()

    assert of("a", "b") == of("a", "b", "a")
    assert len({of("a", "b"), of("b", "a"), of("a", "b", "c"), of("ab"), of("a", "bc"), of("ab", "c")}) == 6


def test_bad_ids():
    vocabulary = Vocabulary("int", "user")
    with pytest.raises(InputError, match="f, row 11: no user id"):
        vocabulary.encode(pa.array([1, None]), where="f", rows=RowNumbers(10))
    with pytest.raises(InputError, match="f, row 2: user id 'x1'; expected an integer"):
        vocabulary.encode(pa.array(["3", "4", "x1"]), where="f")
    with pytest.raises(InputError, match=r"f: user id .*9223372036854775808"):
        vocabulary.encode(pa.array([2**63], pa.uint64()), where="f")
    with pytest.raises(InputError, match="f: type double; expected integers or strings"):
        Vocabulary.kind_of(pa.float64(), "f")
    with pytest.raises(InputError, match="v, row 1: the raw id 7 occurs twice"):
        Vocabulary.from_table(pa.table({"raw": [7, 7], "count": [1, 1]}), "v")
    small = Vocabulary("int", "user", budget=10_000)
    with pytest.raises(InputError, match=r"vocabulary of user: over 0 ids need more than the limit of 0\.0 GiB"):
        small.encode(pa.array(np.arange(1000)))


def test_integers_become_strings_and_keep_their_numbers():
    vocabulary = Vocabulary("int", "user")
    vocabulary.encode(pa.array([7, -1, 7]))
    vocabulary.encode(pa.array([10**18]))
    vocabulary.become_strings()
    assert vocabulary.encode(pa.array(["007", "7", str(10**18)])).tolist() == [3, 0, 2]
    assert vocabulary.table().column("raw").to_pylist() == ["7", "-1", str(10**18), "007"]
    assert vocabulary.counts.tolist() == [3, 1, 2, 1]


def test_finding_takes_text_for_integers():
    vocabulary = Vocabulary("int", "user")
    vocabulary.encode(pa.array([7, 8]))
    assert vocabulary.find(pa.array(["8", "08", "x", None, "7"])).tolist() == [1, -1, -1, -1, 0]
    assert len(vocabulary) == 2


@pytest.mark.parametrize("kind", ["int", "string"])
@pytest.mark.parametrize("count", [True, False])
def test_growth_copies_each_id_a_few_times(monkeypatch, kind, count):
    """Not once a batch, which would be quadratic."""
    copied = []
    real = module.grown

    def counting(array, size):
        copied.append(len(array) if len(array) < size else 0)
        return real(array, size)

    monkeypatch.setattr(module, "grown", counting)
    vocabulary = Vocabulary(kind, "user")
    for first in range(0, 20_000, 100):
        raw = pa.array(np.arange(first, first + 100))
        vocabulary.encode(raw.cast(pa.string()) if kind == "string" else raw, count=count)
    assert len(vocabulary) == 20_000
    assert sum(copied) < 4 * 20_000 * (2 if kind == "string" else 1)
