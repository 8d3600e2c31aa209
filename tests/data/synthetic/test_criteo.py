"""The made log with Criteo's columns: deterministic, readable as an ingested one, with ids that are alike in groups."""

from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recpress.data.config import IngestConfig, LayoutConfig, StreamConfig, SynthCriteoConfig
from recpress.data.dataset.log import open_log
from recpress.data.errors import InputError
from recpress.data.ingest.encoder import Encoder
from recpress.data.ingest.formats import CATEGORIES, INTS
from recpress.data.ingest.sources import RawLog
from recpress.data.sampling.scan import iter_columns
from recpress.data.stream.loader import InteractionStream
from recpress.data.synthetic.criteo import BLOCK, SIZES, SyntheticCriteo, feature_sizes, synth_criteo

SMALL = SynthCriteoConfig(rows=20_000, test_rows=3000, ids=3000)
MADE = SyntheticCriteo(SMALL)


def column(rows, name):
    return np.concatenate([part[name] for part in iter_columns(rows, [name])])


def files(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.parquet")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    config = replace(SMALL, layout=LayoutConfig(rows_per_file=8000, row_group_rows=3000))
    return synth_criteo(config, tmp_path_factory.mktemp("criteo") / "log")


def test_a_log_as_ingest_writes_it(folder):
    log = open_log(folder, pairs=False)
    assert (log.train.num_rows, log.test.num_rows) == (20_000, 3000)
    assert (log.schema.user, log.schema.label) == ("", "label")
    assert log.schema.categorical == tuple(CATEGORIES)
    assert log.schema.floats == tuple(INTS)
    sizes = feature_sizes(SMALL.ids)
    for name, size in zip(CATEGORIES, sizes, strict=True):
        assert log.train.columns[name].limit == size
        counts = pq.read_table(folder / "vocabulary" / f"feature-{name}.parquet").column("count").to_numpy()
        assert np.array_equal(counts, np.bincount(column(log.train, name), minlength=size))
    batch = next(iter(InteractionStream(log.train, log.schema, StreamConfig(batch_size=512))))
    assert batch.floats.shape == (512, 13)
    assert set(batch.categorical) == set(CATEGORIES)


def test_held_out_rows_are_a_share_of_the_rows_unless_given():
    assert [SynthCriteoConfig(rows=rows).held_out for rows in (1_000_000, 8000, 3)] == [200_000, 1600, 1]
    assert SMALL.held_out == 3000


def test_rows_of_the_files_are_those_of_their_places(folder):
    log = open_log(folder, pairs=False)
    for part, rows in (("train", log.train), ("test", log.test)):
        label, floats, ids = MADE.rows(part, 0, rows.num_rows)
        assert np.array_equal(column(rows, "label"), label)
        assert np.array_equal(column(rows, "I3"), floats[:, 2], equal_nan=True)
        assert np.array_equal(column(rows, "C21"), ids[:, 20])
    assert not np.array_equal(column(log.train, "C21")[:3000], column(log.test, "C21"))


def test_deterministic_by_its_seed(tmp_path):
    config = replace(SMALL, rows=2000, test_rows=100)
    for name, made in (("a", config), ("b", config), ("c", replace(config, seed=1))):
        synth_criteo(made, tmp_path / name)
    assert files(tmp_path / "a") == files(tmp_path / "b")
    assert files(tmp_path / "a") != files(tmp_path / "c")


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 2 * BLOCK), st.integers(1, 300))
def test_rows_depend_on_their_place_alone(first, size):
    longer = MADE.rows("train", 0, first + size)
    for part, whole in zip(MADE.rows("train", first, first + size), longer, strict=True):
        assert np.array_equal(part, whole[first:], equal_nan=True)


def test_sizes_keep_criteos_order_and_sum_to_what_is_asked():
    for ids in (3000, 400_000, sum(SIZES)):
        sizes = feature_sizes(ids)
        assert abs(sum(sizes) - ids) <= 13
        assert sorted(range(26), key=lambda f: (sizes[f], SIZES[f])) == sorted(range(26), key=SIZES.__getitem__)
    assert feature_sizes(sum(SIZES)) == SIZES


def test_access_is_skewed_and_the_number_of_an_id_says_nothing():
    _, _, ids = MADE.rows("train", 0, 60_000)
    feature = int(np.argmax(MADE.sizes))
    counts = np.bincount(ids[:, feature], minlength=MADE.sizes[feature])
    top = np.sort(counts)[::-1]
    weights = np.arange(1, len(counts) + 1) ** -SMALL.skew
    assert top[0] == pytest.approx(60_000 * weights[0] / weights.sum(), rel=0.1)
    tenth = len(counts) // 10
    assert top[:tenth].sum() == pytest.approx(60_000 * weights[:tenth].sum() / weights.sum(), rel=0.1)
    place = np.arange(len(counts))
    assert abs(np.corrcoef(place, counts)[0, 1]) < 0.15
    for modulus in (8, 64):  # each residue holds ids of many groups
        assert len(np.unique(MADE.groups[feature][place % modulus == 0])) > 5


def test_labels_follow_the_planted_probability():
    label, floats, _ = MADE.rows("test", 0, 3 * BLOCK)
    planted = MADE.probabilities("test", 0, 3 * BLOCK)
    assert label.mean() == pytest.approx(SMALL.positives, abs=0.01)
    for low, high in ((0.0, 0.1), (0.3, 0.4), (0.7, 0.9)):
        chosen = (planted >= low) & (planted < high)
        assert label[chosen].mean() == pytest.approx(planted[chosen].mean(), abs=0.03)
    assert np.isnan(floats).mean() == pytest.approx(0.1, abs=0.01)


def test_ids_of_a_group_are_alike_and_ids_of_two_groups_are_not():
    """By the label's rate in the feature with the most ids: what a group says of its ids, with all else left out."""
    made = SyntheticCriteo(
        replace(SMALL, groups=16, interactions=0.0, dense=0.0, noise=0.0, effects=3.0, deviation=0.0)
    )
    _, _, ids = made.rows("train", 0, 10 * BLOCK)
    planted = made.probabilities("train", 0, 10 * BLOCK)
    feature = int(np.argmax(made.sizes))
    group = made.groups[feature][ids[:, feature]]
    rate = np.array([planted[group == g].mean() for g in range(16)])
    half = ids[:, feature] % 2 == 0
    of_halves = [np.array([planted[(group == g) & part].mean() for g in range(16)]) for part in (half, ~half)]
    assert np.abs(of_halves[0] - of_halves[1]).max() < 0.3 * rate.std()


def test_a_log_that_is_made_can_be_extended(folder):
    log = open_log(folder, pairs=False)
    encoder = Encoder(RawLog("csv", (), log.schema, lambda: iter(())), IngestConfig(input="", extend=str(folder)))
    assert [entry["num_ids"] for entry in encoder.manifest()["features"].values()] == list(MADE.sizes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": 0}, "rows is 0; expected at least 1"),
        ({"latent": 0}, "latent is 0"),
        ({"skew": float("nan")}, "skew is nan"),
        ({"noise": -1.0}, r"noise is -1\.0"),
        ({"deviation": 1.5}, r"deviation is 1\.5; expected a number in \[0, 1\]"),
        ({"positives": 1.0}, r"positives is 1\.0"),
        ({"ids": 77}, "ids is 77; expected 78 to 33762577"),
        ({"ids": 40_000_000}, "ids is 40000000"),
    ],
)
def test_options_out_of_range(tmp_path, change, message):
    with pytest.raises(InputError, match=message):
        synth_criteo(replace(SMALL, **change), tmp_path / "log")
    assert list(tmp_path.iterdir()) == []
