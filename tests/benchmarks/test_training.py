"""The cases of the training benchmark, and the batches that it reads from a log."""

from argparse import Namespace
from dataclasses import replace

import numpy as np
import pytest
import torch

from recpress.benchmarks import loops, training
from recpress.benchmarks.loops import LOOPS, OURS, Case, LogBatches, make_log
from recpress.benchmarks.processes import in_own_processes

CASE = Case(tables="trained", loop=OURS, table_rows=500, dim=8, batch=64, ranks=1, share=1.0, negatives=3)
VARIED = ("table_rows", "dim", "batch", "ranks", "share", "rate")


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made") / "log"
    make_log(folder, CASE, 2000)
    return str(folder)


def test_cases_vary_one_thing_at_a_time_and_ours_is_in_each():
    args = Namespace(
        table_rows=[100, 10, 1000], dims=[8, 4], batches=[32, 16], ranks=[1, 2], shares=[0.1, 0.5], rates=[0.1, 1.0],
        tables=[*LOOPS], negatives=2, runs=3, axis_runs=1,
    )  # fmt: skip
    found = training.cases(args)
    bases = {case.tables: case for case in reversed(found) if case.loop == OURS}
    for case, runs in found.items():
        differences = [name for name in VARIED if getattr(case, name) != getattr(bases[case.tables], name)]
        assert len(differences) <= 1, case
        assert runs == (3 if differences in ([], ["ranks"]) else 1)
        assert found[replace(case, loop=OURS)] == runs  # it is what the others are compared with
    for name, values in {"table_rows": 3, "dim": 2, "batch": 2, "ranks": 2, "share": 3, "rate": 3}.items():
        assert len({getattr(case, name) for case in found}) == values, name
    for tables, peers in LOOPS.items():
        for ranks in (1, 2):
            here = [case.loop for case in found if case.tables == tables and case.ranks == ranks]
            assert set(here) == set(peers)
    trained = {case.loop for case in found if case.tables == "trained" and case.table_rows == 1000}
    assert trained == set(LOOPS["trained"])


@pytest.mark.parametrize("rate", [1.0, 0.3])
@pytest.mark.parametrize("ranks", [1, 2])
def test_batches_of_a_log_are_its_sample_each_row_once_an_epoch(log, rate, ranks):
    case = replace(CASE, ranks=ranks, rate=rate)
    parts = [LogBatches(log, case, rank, torch.device("cpu")) for rank in range(ranks)]
    epochs = []
    for _ in range(2):
        users = []
        for part in parts:
            for batch in part:
                size = len(batch.label)
                assert len(batch.item_features["item"].values()) == size * (1 + case.negatives)
                assert batch.item_features["item"].values().max() < case.items
                users.append(batch.user_features["user"].values().numpy())
        epochs.append(np.concatenate(users))
        assert len(epochs[-1]) == parts[0].rows == pytest.approx(rate * 2000, rel=0.15)
    assert epochs[0].tolist() != epochs[1].tolist()
    assert sorted(epochs[0]) == sorted(epochs[1])


@pytest.mark.parametrize(("loop", "rate"), [(OURS, 0.5), (loops.SPARSE, None)])
def test_a_case_is_measured_on_ranks_of_its_own(log, loop, rate):
    args = Namespace(device="cpu", threads=1, rows=256, hidden=[8])
    case = replace(CASE, loop=loop, ranks=1 if rate else 2, rate=rate)
    figures = in_own_processes(training.measured, case.ranks, case, log, args)
    assert len(figures) == case.ranks
    assert all(value > 0 for value in figures[0].values())
    assert ("seconds an epoch" in figures[0]) == (rate is not None)
    (row,) = training.table({replace(case, loop=OURS): [figures[0]]})
    assert row["recpress / this, rows/s"] == 1
    assert (row["sample rate"], row["runs"]) == (rate, 1)
