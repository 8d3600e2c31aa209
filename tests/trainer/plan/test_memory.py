"""Formulas against known answers."""

import pytest

from recpress.trainer.config import AutoOptimizerConfig, CheckpointConfig
from recpress.trainer.plan.config import ClusterConfig
from recpress.trainer.plan.stage import plan
from tests.trainer.plan.jobs import config, line


def one_rank(**changes):
    return plan(config(cluster=ClusterConfig(ranks_per_node=1), compare=False, **changes))["lines"]


@pytest.mark.parametrize(
    ("storage", "bytes_of_row", "bytes_of_count"),
    [("fp32", 512, 16), ("fp16", 256, 16), ("int8", 144, 16), ("int4", 80, 16)],  # on CUDA padded to 16
)
def test_frozen_tables_take_the_bytes_of_their_rows(storage, bytes_of_row, bytes_of_count):
    assert line(one_rank(storage=storage), "frozen tables") == 1_100_000 * (bytes_of_row + bytes_of_count)


def test_trained_tables_have_four_bytes_of_state_a_row():
    lines = one_rank(strategy="random")
    assert line(lines, "trainable tables") == 1_100_000 * 512
    assert line(lines, "optimizer state") == 1_100_000 * 4
    assert not any(entry["name"] == "frozen tables" for entry in lines)


def test_uploads_take_memory_where_checkpoints_go_to_a_store():
    def upload(**changes):
        return [entry["bytes"] for entry in one_rank(**changes) if entry["name"] == "upload of a checkpoint"]

    remote = CheckpointConfig(folder="s3://bucket/run")
    assert upload(strategy="random") == upload(strategy="random", checkpoint=CheckpointConfig(folder="run")) == []
    assert upload(strategy="random", checkpoint=remote) == upload(strategy="random", out="s3://bucket/x") == [224 << 20]
    small = one_rank(checkpoint=remote)  # frozen tables are not in it
    assert line(small, "upload of a checkpoint") == line(small, "copy for checkpoints") < 224 << 20


@pytest.mark.parametrize(("strategy", "trained"), [("random", 1_100_000 * 516), ("frozen", 0)])
def test_a_checkpoint_is_copied_in_host_memory_without_frozen_tables_and_gradients(strategy, trained):
    found = plan(config(strategy=strategy, cluster=ClusterConfig(ranks_per_node=1), compare=False))
    copy, dense = line(found["lines"], "copy for checkpoints"), line(found["lines"], "dense part")
    assert copy == trained + dense * 3 // 4  # weights and two moments, without gradients
    host, device = found["peaks"]["host"], found["peaks"]["device"]
    assert host["checkpoint"] - host["train"] == copy
    assert device["checkpoint"] == device["train"]


@pytest.mark.parametrize(("tables", "numbers"), [("adam", 2 * 128), ("row-wise-adam", 128 + 1), ("adagrad", 128)])
def test_optimizers_of_tables_have_their_state(tables, numbers):
    found = one_rank(strategy="random", optimizer=AutoOptimizerConfig(tables=tables))
    assert line(found, "optimizer state") == 1_100_000 * 4 * numbers


def test_an_average_is_one_more_copy_of_the_dense_part():
    with_average, without = one_rank(ema=0.99), one_rank()
    weights = line(without, "dense part") // 4
    assert line(with_average, "average of the dense part") == weights
    assert line(with_average, "copy for checkpoints") == line(without, "copy for checkpoints") + weights
