"""Validation rows: which they are, that they are not trained on, and what is read of the log for them."""

import warnings
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recpress.data.config import SampleConfig, Schema, StreamConfig
from recpress.data.dataset.log import open_log
from recpress.data.dataset.parquet_split import ParquetSplit
from recpress.data.sampling.scan import iter_columns
from recpress.data.sampling.selection import Selection
from recpress.modules.config import TablesConfig, TwoTowerConfig
from recpress.trainer.config import EvaluationConfig, TrainConfig
from recpress.trainer.distributed.process_group import process_group
from recpress.trainer.evaluate.heldout import FullHeldout, SampledHeldout
from recpress.trainer.train.data import make_stream
from recpress.trainer.train.validation import LEAST_CASES, NoRows, ValidationRows, load_validation, plan_hold_out
from tests.ranks import run_on_ranks

USERS, ITEMS, ROWS, GROUP = 400, 150, 12_000, 1_000


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Distinct pairs in random order, 12 row groups; `val` and `test` have pairs that train has not."""
    rng = np.random.default_rng(0)
    keys = rng.permutation(USERS * ITEMS)[: ROWS + 1_000]
    root = tmp_path_factory.mktemp("log")
    for name, part in (("train", keys[:ROWS]), ("val", keys[ROWS : ROWS + 500]), ("test", keys[ROWS + 500 :])):
        pq.write_table(
            pa.table({"user_id": part // ITEMS, "item_id": part % ITEMS}),
            root / f"{name}.parquet",
            row_group_size=GROUP,
        )
    return root


def config(**changes):
    settings = {
        "sample": SampleConfig(rate=0.5, seed=4),
        "model": TwoTowerConfig(tables=TablesConfig(strategy="random")),
        "stream": StreamConfig(batch_size=256),
        "evaluation": EvaluationConfig(validation="sample", protocol="sampled"),
    }
    return TrainConfig(data="log", out="out", **{**settings, **changes}).resolved()


def load(folder, config, count_items=True):
    log = open_log(folder)
    with process_group("cpu") as ranks:
        hold_out = plan_hold_out(config, log)
        stream = make_stream(config, log, ranks, hold_out=hold_out)
        trained = [np.stack([b.user.numpy(), b.item.numpy()], 1) for b in stream]
        return load_validation(config, log, hold_out, ranks, count_items=count_items), np.concatenate(trained), log


def keys(users, items):
    return users * ITEMS + items


@pytest.mark.parametrize("kind", ["rows", "block", "user"])
def test_held_out_rows_are_of_the_sample_and_are_not_trained_on(folder, kind, monkeypatch, tmp_path):
    monkeypatch.setenv("RECPRESS_CACHE", str(tmp_path))
    asked = config(sample=SampleConfig(kind=kind, rate=0.5, seed=4))
    found, trained, log = load(folder, asked)
    held = keys(found.heldout.users, found.heldout.targets.values)
    trained = keys(*trained.T)
    sample = [
        keys(d["user_id"], d["item_id"]) for d in iter_columns(log.train, ["user_id", "item_id"], sample=asked.sample)
    ]
    np.testing.assert_array_equal(np.sort(np.concatenate([held, trained])), np.sort(np.concatenate(sample)))
    assert 0.15 < len(held) / (len(held) + len(trained)) < 0.25  # at most a fifth of a small sample
    assert found.source == "sample"
    np.testing.assert_array_equal(found.item_counts, np.bincount(trained % ITEMS, minlength=ITEMS))


def test_negatives_are_items_that_the_user_has_not_met(folder):
    found, _, log = load(folder, config())
    assert isinstance(found.heldout, SampledHeldout)
    everything = [keys(d["user_id"], d["item_id"]) for d in iter_columns(log.train, ["user_id", "item_id"])]
    owner = np.repeat(found.heldout.users, found.heldout.negatives.lengths)
    negatives = keys(owner, found.heldout.negatives.values)
    assert not np.isin(negatives, np.concatenate(everything)).any()
    case = np.repeat(np.arange(len(found.heldout.users)), found.heldout.negatives.lengths)
    assert len(np.unique(case * ITEMS + found.heldout.negatives.values)) == len(case)  # distinct in each case
    assert 40 < found.heldout.negatives.lengths.mean() <= 99


def test_all_items_are_ranked_with_all_that_the_user_has_met_masked(folder):
    found, _, log = load(folder, config(evaluation=EvaluationConfig(validation="sample")))
    assert isinstance(found.heldout, FullHeldout)
    everything = [keys(d["user_id"], d["item_id"]) for d in iter_columns(log.train, ["user_id", "item_id"])]
    seen = keys(np.repeat(found.heldout.users, found.heldout.seen.lengths), found.heldout.seen.values)
    held = keys(np.repeat(found.heldout.users, found.heldout.targets.lengths), found.heldout.targets.values)
    everything = np.concatenate(everything)
    wanted = everything[np.isin(everything // ITEMS, found.heldout.users)]
    np.testing.assert_array_equal(np.sort(np.concatenate([seen, held])), np.sort(wanted))


def test_the_val_part_of_a_log_is_used_whole_and_nothing_is_held_out(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # such as torch's of arrays that it must not write to
        found, trained, log = load(folder, config(evaluation=EvaluationConfig(protocol="sampled")))
    assert found.source == "val"
    assert found.weights is None
    val = [keys(d["user_id"], d["item_id"]) for d in iter_columns(log.val, ["user_id", "item_id"])]
    np.testing.assert_array_equal(
        np.sort(keys(found.heldout.users, found.heldout.targets.values)), np.sort(np.concatenate(val))
    )
    assert len(trained) == Selection(log.train, config().sample).num_rows


def test_a_block_sample_reads_its_own_row_groups_alone(folder, monkeypatch):
    asked = config(sample=SampleConfig(kind="block", rate=0.25, seed=1))
    read = set()
    whole = ParquetSplit.read

    def counted(self, group, columns):
        read.add((self.files[group.file].path.rsplit("/", 1)[-1], group.group))
        return whole(self, group, columns)

    monkeypatch.setattr(ParquetSplit, "read", counted)
    found, _, log = load(folder, asked)
    selection = Selection(log.train, asked.sample)
    assert read == {("train.parquet", log.train.groups[place].group) for place in selection.candidates}
    assert len(read) == 3
    assert found.heldout.num_cases > 0


def test_users_count_alike_whatever_the_number_of_their_rows(folder):
    found, _, log = load(folder, config())
    rows = np.bincount(np.concatenate([d["user_id"] for d in iter_columns(log.train, ["user_id"])]), minlength=USERS)
    np.testing.assert_allclose(found.weights, 1 / rows[found.heldout.users])


@pytest.mark.parametrize(
    ("look", "rate"),
    [({"every": 0}, 0.5), ({"validation": "test"}, 0.5), ({}, 0.05)],
)
def test_nothing_is_held_out_without_evaluations_or_of_few_rows(folder, look, rate):
    log = open_log(folder)
    look = EvaluationConfig(**{"validation": "sample", **look})
    assert plan_hold_out(config(evaluation=look, sample=SampleConfig(rate=rate)), log) is None


def test_at_most_so_many_rows_are_held_out():
    log = SimpleNamespace(
        val=None, test=None, test_negatives=None, num_items=ITEMS,
        train=SimpleNamespace(groups=[SimpleNamespace(file=0, group=0, num_rows=10**7)]),
    )  # fmt: skip
    hold_out = plan_hold_out(config(sample=SampleConfig(rate=1.0)), log)
    assert hold_out.rate == pytest.approx(0.002)


def test_rows_with_a_label_of_no_are_not_validated_on(tmp_path):
    users, items = np.arange(3_000) // 30, np.arange(3_000) % 70
    label = (items % 2).astype(np.float32)
    pq.write_table(pa.table({"user_id": users, "item_id": items, "yes": label}), tmp_path / "train.parquet")
    asked = config(sample=SampleConfig(rate=1.0), use_label=True)
    log = open_log(tmp_path, Schema(label="yes"))
    with process_group("cpu") as ranks:
        found = load_validation(asked, log, plan_hold_out(asked, log), ranks, count_items=False)
    assert found.heldout.num_cases > 100
    assert (found.heldout.targets.values % 2 == 1).all()


def repeating_log(folder, new_rows):
    """Rows that users repeat, but for the last `new_rows`, of users of their own: only these make cases."""
    rng = np.random.default_rng(1)
    users = np.concatenate([rng.integers(40, size=4_000), 40 + np.arange(new_rows)])
    items = np.concatenate([users[:4_000] % 50, 50 + np.arange(new_rows) % 20])
    pq.write_table(pa.table({"user_id": users, "item_id": items}), folder / "train.parquet", row_group_size=GROUP)
    return str(folder)


def cases_of(folder):
    asked = config(sample=SampleConfig(rate=1.0))
    log = open_log(folder)
    with process_group("cpu") as ranks:
        found = load_validation(asked, log, plan_hold_out(asked, log), ranks, count_items=False)
    return found.why if isinstance(found, NoRows) else found.heldout.num_cases


def test_too_few_cases_are_no_validation_rows(tmp_path):
    """The rows that are held out mostly repeat others, and leave a few cases over all ranks."""
    few, enough = (tmp_path / name for name in ("few", "enough"))
    few.mkdir()
    enough.mkdir()
    (why,) = run_on_ranks(cases_of, 1, repeating_log(few, 60))
    assert "too few validation rows" in why
    left = int(why.split(" cases")[0].split()[-1])
    assert 0 < left < LEAST_CASES
    assert str(LEAST_CASES) in why
    assert run_on_ranks(cases_of, 2, str(few)) == [why] * 2
    # enough on two ranks together, and not on one of them
    counts = run_on_ranks(cases_of, 2, repeating_log(enough, 220))
    assert counts[0] == counts[1]
    assert LEAST_CASES <= counts[0] < 2 * LEAST_CASES


def test_a_small_val_part_is_no_validation_rows(folder, tmp_path):
    (tmp_path / "train.parquet").symlink_to(folder / "train.parquet")
    pq.write_table(pq.read_table(folder / "val.parquet").slice(0, LEAST_CASES - 1), tmp_path / "val.parquet")
    found, _, _ = load(tmp_path, config(evaluation=EvaluationConfig(protocol="sampled")))
    assert isinstance(found, NoRows)
    assert "val part" in found.why
    pq.write_table(pq.read_table(folder / "val.parquet").slice(0, LEAST_CASES), tmp_path / "val.parquet")
    found, _, _ = load(tmp_path, config(evaluation=EvaluationConfig(protocol="sampled")))
    assert isinstance(found, ValidationRows)
