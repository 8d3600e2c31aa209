"""Checkpoints on an object store: a real server, which fails when told to, and ranks without a common disk."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from torch import multiprocessing as mp

from recpress.data.dataset import object_store
from recpress.data.errors import InputError
from recpress.trainer.checkpoint.checkpoints import Checkpoints
from recpress.trainer.checkpoint.remote import ObjectStoreBackend
from recpress.trainer.config import CheckpointConfig
from recpress.trainer.loop.fit import FitConfig, fit
from recpress.trainer.observability.metrics_log import MetricsLog
from tests.ranks import run_on_ranks
from tests.s3_server import BUCKET, s3  # noqa: F401  # a fixture
from tests.trainer.checkpoint.test_checkpoints import DESCRIBE, Killed, train
from tests.trainer.small import CPU, batches, sharded


@pytest.fixture
def base(s3, request, monkeypatch, tmp_path):  # noqa: F811
    monkeypatch.setenv("RECPRESS_STORAGE_TIMEOUT", "2")
    monkeypatch.setenv("RECPRESS_STORAGE_PATIENCE", "0.5")
    monkeypatch.setenv("RECPRESS_CACHE", str(tmp_path / "cache"))
    s3.use(monkeypatch.setenv)
    return f"s3://{BUCKET}/{re.sub(r'[^a-z0-9]', '-', request.node.name)}"


@pytest.fixture(scope="module")
def quiet(tmp_path_factory):
    """Of a run on local disk that nothing befell."""
    return run_on_ranks(train, 1, tmp_path_factory.mktemp("quiet"))[0]


@pytest.fixture(scope="module")
def quiet_on_two(tmp_path_factory):
    return run_on_ranks(train, 2, tmp_path_factory.mktemp("quiet"))


def crashed(folder, crash, **config):
    """What lies there afterwards."""
    with pytest.raises(Killed):
        train(folder, crash=crash, **config)
    return names(folder)


def names(folder):
    return sorted({path.partition("/")[0] for path in object_store.list_files(folder)})


def apart(folder, cache):
    """This rank is a machine of its own."""
    os.environ |= {"LOCAL_RANK": "0", "RECPRESS_CACHE": f"{cache}/{os.environ['RANK']}"}
    left = crashed(folder, crash=8)
    shutil.rmtree(os.environ["RECPRESS_CACHE"])  # it goes on on other machines
    return left, train(folder)


def test_ranks_without_a_common_disk_go_on_to_the_bits_of_a_run_that_was_never_stopped(base, tmp_path, quiet_on_two):
    for rank, (left, after) in enumerate(run_on_ranks(apart, 2, base, tmp_path / "caches")):
        assert left == ["best-00000000", "best-00000006", "step-00000003", "step-00000006"]
        assert after == quiet_on_two[rank]  # and nothing was said


def killed(folder):
    """Rank 1 gets SIGKILL in step 8, while its part of the checkpoint of step 6 does not get through."""
    if os.environ["RANK"] == "1":
        begin = ObjectStoreBackend.upload

        def upload(self, staging, name, files):
            if name == "step-00000006":
                os.kill(os.getpid(), signal.SIGKILL)
            begin(self, staging, name, files)

        ObjectStoreBackend.upload = upload
    train(folder)


def test_what_a_killed_rank_had_not_uploaded_is_passed_over(base, quiet_on_two):
    with pytest.raises((mp.ProcessExitedException, RuntimeError)):  # of rank 1, or of rank 0, which lost it
        run_on_ranks(killed, 2, base)
    assert "step-00000003" in names(base)
    (*first, said), (*second, _) = run_on_ranks(train, 2, base)
    assert [tuple(first), tuple(second)] == [result[:4] for result in quiet_on_two]
    assert said in (
        [],
        [f"checkpoint {base}/step-00000006 is incomplete or corrupt, skipping: no manifest.json"],
    )


@pytest.mark.parametrize("fault", ["unavailable", "reset", "stall"])
def test_a_store_that_fails_for_a_moment_costs_no_checkpoint(base, s3, quiet, monkeypatch, fault):  # noqa: F811
    monkeypatch.setenv("RECPRESS_STORAGE_PATIENCE", "30")
    listing = "none" if fault == "stall" else "GET .*list-type"  # a stall takes its time
    with s3.failing(fault, "PUT .*step-00000006/tensors-0", times=1), s3.failing(fault, listing, times=1, after=3):
        assert run_on_ranks(train, 1, base)[0] == quiet
    assert s3.count(f"PUT .*{base.rpartition('/')[2]}/step-00000006/tensors-0") >= 2


def through_faults(folder, server, match):
    with server.failing("unavailable", match):
        return train(folder), names(folder)


@pytest.mark.parametrize(
    "match",
    ["PUT .*step-00000009/tensors-0", "PUT .*step-00000009/manifest", "GET .*step-00000009"],
    ids=["upload", "manifest", "listing"],
)
def test_a_store_that_goes_on_failing_costs_one_checkpoint_and_no_step(base, s3, quiet, match):  # noqa: F811
    (*after, said), left = run_on_ranks(through_faults, 1, base, s3, match)[0]
    assert tuple(after) == quiet[:4]
    assert len(said) == 1
    assert f"a checkpoint was not written: {base}/step-00000009" in said[0]
    assert f"training continues, the last complete checkpoint is {base}/step-00000006" in said[0]
    assert "step-00000009" not in left  # nothing of it is left once the next one is whole
    assert "step-00000012" in left


def kept(folder):
    return crashed(folder, 17, keep=2), object_store.list_files(folder)


def test_only_the_last_ones_are_kept(base):
    left, files = run_on_ranks(kept, 1, base)[0]
    assert left == ["best-00000006", "step-00000012", "step-00000015"]
    assert {name.partition("/")[2] for name in files} == {"tensors-0.bin", "tensors.json", "run.json", "manifest.json"}


def damage(folder, how):
    crashed(folder, crash=11)
    file = f"{folder}/step-00000009/tensors-0.bin"
    content = object_store.read_bytes(file)
    if how == "truncated":
        object_store.write_bytes(file, content[: len(content) // 2])
    elif how == "flipped bit":
        object_store.write_bytes(file, content[:5000] + bytes([content[5000] ^ 1]) + content[5001:])
    elif how == "no object":
        object_store.remove(file)
    elif how == "no best":
        object_store.remove(f"{folder}/best-00000006/manifest.json")
    return train(folder)


@pytest.mark.parametrize("how", ["truncated", "flipped bit", "no object", "no best"])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(base, quiet, how):
    *after, said = run_on_ranks(damage, 1, base, how)[0]
    assert f"{base}/step-00000009 is incomplete or corrupt, skipping" in said[0]
    assert tuple(after) == quiet[:4]


def resumed_through_short_answers(folder, server):
    crashed(folder, crash=11)
    with server.failing("short", "GET .*step-00000009/tensors-0", times=1):
        return train(folder)


def test_an_object_that_was_cut_on_its_way_is_fetched_again(base, s3, quiet):  # noqa: F811
    assert run_on_ranks(resumed_through_short_answers, 1, base, s3)[0] == quiet


def unreachable(folder, server):
    left = crashed(folder, crash=8)
    with server.failing("unavailable", "GET .*step-0000000"), pytest.raises(InputError) as error:
        Checkpoints(CheckpointConfig(), folder, DESCRIBE)
    return left, names(folder), str(error.value)


def test_a_store_that_does_not_answer_ends_the_start_and_nothing_is_passed_over(base, s3):  # noqa: F811
    before, after, message = run_on_ranks(unreachable, 1, base, s3)[0]
    assert before == after
    assert f"{base}/step-00000006/manifest.json: cannot be read" in message


def with_metrics(folder, crash=None):
    """Steps of `metrics.jsonl` when training has ended."""
    dmp, optimizer = sharded("warm-start")
    step = optimizer.step

    def counted_step():
        if optimizer.steps == crash:
            raise Killed
        step()

    optimizer.step = counted_step
    checkpoints = Checkpoints(CheckpointConfig(steps=3, minutes=0), folder, DESCRIBE)
    with checkpoints:
        try:
            with MetricsLog(checkpoints.metrics, tensorboard=True) as log:
                fit(
                    dmp, optimizer, batches, FitConfig(epochs=2, log_every=2), device=CPU, show_progress=False,
                    checkpoints=checkpoints, log=log,
                )  # fmt: skip
        except Killed:
            checkpoints.wait()
            return None
        steps = [json.loads(line)["step"] for line in (checkpoints.metrics / "metrics.jsonl").read_text().splitlines()]
        events = len(list(checkpoints.metrics.glob("events.*")))
        checkpoints.finish()
        return (
            steps,
            events,
            list(object_store.list_files(folder)),
            list(Path(os.environ["RECPRESS_CACHE"]).glob("checkpoints-*")),
        )


def test_metrics_go_on_on_another_machine_and_nothing_is_left_at_the_end(base, monkeypatch, tmp_path):
    assert run_on_ranks(with_metrics, 1, base, 8) == [None]
    monkeypatch.setenv("RECPRESS_CACHE", str(tmp_path / "cache" / "other"))
    ((steps, events, left, local),) = run_on_ranks(with_metrics, 1, base)
    ((quiet, *_),) = run_on_ranks(with_metrics, 1, tmp_path / "quiet")
    assert steps == quiet
    assert events >= 2  # those of both machines
    assert left == []
    assert local == []


def test_a_place_that_cannot_be_written_is_named(base, s3):  # noqa: F811
    with s3.failing("denied", "PUT .*writable"), pytest.raises(InputError, match=f"{base}: cannot hold checkpoints: "):
        run_on_ranks(opened, 1, base)


def opened(folder):
    Checkpoints(CheckpointConfig(), folder, DESCRIBE)


ENDS_BY_AN_ERROR = """
import sys, time
import torch
from recpress.data.errors import InputError
from recpress.trainer import cli
from recpress.trainer.checkpoint.checkpoints import Checkpoints
from recpress.trainer.config import CheckpointConfig
from recpress.trainer.distributed.process_group import process_group
from tests.trainer.checkpoint.test_checkpoints import DESCRIBE

def stage(folder):
    with process_group("cpu"), Checkpoints(CheckpointConfig(), folder, DESCRIBE) as checkpoints:
        checkpoints.save({"a": torch.ones(10)}, {}, 1)
        time.sleep(1)
        raise InputError("of the test") if sys.argv[2] == "user" else KeyError("of the test")

cli._command = lambda arguments: ("train", arguments)
cli._config = lambda name, rest: rest[0]
cli._load = lambda place: stage
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.parametrize(("error", "status", "said"), [("user", 2, "error: of the test"), ("ours", 1, "KeyError: 'of")])
def test_an_error_does_not_wait_for_a_store_that_stalls(base, s3, monkeypatch, error, status, said):  # noqa: F811
    monkeypatch.setenv("RECPRESS_STORAGE_TIMEOUT", "600")
    command = [sys.executable, "-W", "ignore", "-c", ENDS_BY_AN_ERROR, base, error]
    with s3.failing("stall", "PUT .*step-00000001/tensors"):
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == status
    assert said in done.stderr
    assert s3.count(f"PUT .*{base.rpartition('/')[2]}/step-00000001/tensors") == 1  # it was on its way
