"""A real Slurm of two nodes: the stages on 2 x 2 ranks, and what becomes of a run when a part of it is lost."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
from recpress.data.config import SynthConfig
from recpress.data.synth import synth

from tests.cluster.conftest import Jobs, weights
from tests.cluster.slurm import NODES, Slurm, wait_until

FACTORS = ("--als.factors", "8", "--als.sweeps", "3")
NETWORK = (
    *("--stream.batch-size", "64", "--negatives.count", "16", "--model.towers.hidden", "16", "--sample.rate", "1"),
    *("--model.tables.strategy", "init-train", "--model.tables.dim", "8", "--no-tensorboard"),
)


@pytest.fixture(scope="session")
def log(tmp_path_factory: pytest.TempPathFactory) -> str:
    made = SynthConfig(users=800, items=600, rows=24_000, tastes=8, tastes_per_user=4)
    return str(synth(made, tmp_path_factory.mktemp("log") / "log"))


@pytest.fixture(scope="session")
def factors(jobs: Jobs, log: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    out = str(tmp_path_factory.mktemp("made") / "factors")
    jobs.run("factorize", "--data", log, "--out", out, *FACTORS)
    return out


def training(log: str, factors: str, out: Path, *more: str) -> tuple[str, ...]:
    return ("--data", log, "--factors", factors, "--out", str(out), *NETWORK, *("--epochs", "4"), *more)


@pytest.fixture(scope="session")
def quiet(jobs: Jobs, log: str, factors: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The weights of a run that nothing befell."""
    out = tmp_path_factory.mktemp("quiet") / "model"
    jobs.run("train", *training(log, factors, out))
    return weights(out)


def started(jobs: Jobs, job: str, out: Path) -> None:
    """Return when the job has trained for some steps: its metrics say so, wherever they lie until it is done."""

    def some() -> bool:
        return any(path.read_text().count("\n") >= 2 for path in out.parent.rglob("metrics.jsonl"))

    try:
        wait_until(some, f"job {job} trains", 90)
    except TimeoutError as error:
        error.add_note(jobs.log(job))
        raise


def test_every_stage_runs_on_two_nodes(
    jobs: Jobs, log: str, factors: str, quiet: dict[str, bytes], fresh: Path
) -> None:
    maps, model = str(fresh / "maps"), str(fresh / "model")
    jobs.run("hash", "--data", log, "--factors", factors, "--out", maps, "--share", "0.5")
    jobs.run("train", *training(log, factors, fresh / "model", "--hash", maps))
    metrics = fresh / "metrics.json"
    job = jobs.run("evaluate", "--data", log, "--model", model, "--out", str(metrics))
    assert "HR@10" in metrics.read_text()
    handle = f"slurm://torchx/{job}"
    assert "SUCCEEDED" in jobs.torchx("status", handle)
    assert "HR@10" in jobs.torchx("log", "--streams", "stdout", handle)


def test_a_pipeline_goes_on_at_the_stage_that_failed(jobs: Jobs, log: str, fresh: Path) -> None:
    out = fresh / "run"
    words = ["--data", log, "--out", str(out), "--factorize.als.factors", "8", "--factorize.als.sweeps", "2"]
    for name, value in zip(NETWORK[::2], NETWORK[1::2], strict=False):
        words += [name.replace("--", "--train."), value] if name != "--no-tensorboard" else []
    words += ["--train.no-tensorboard", "--train.epochs", "1"]
    failed = jobs.submit("pipeline", *words, "--train.user-features", "shoe_size", options=("--max_restarts", "0"))
    assert jobs.wait(failed) == "FAILED"
    assert "shoe_size" in jobs.log(failed)
    job = jobs.run("pipeline", *words)
    assert f"factorize: {out}/factors is whole" in jobs.log(job)
    assert sorted(path.name for path in out.iterdir()) == ["factors", "metrics.json", "model"]


def test_a_killed_worker(jobs: Jobs, log: str, factors: str, quiet: dict[str, bytes], fresh: Path) -> None:
    job = jobs.submit("train", *training(log, factors, fresh / "model", "--checkpoint.steps", "20"))
    started(jobs, job, fresh / "model")
    os.kill(jobs.workers(NODES[1], "train")[0], signal.SIGKILL)
    assert jobs.wait(job) == "COMPLETED", jobs.log(job)
    assert "goes on from" in jobs.log(job)
    assert weights(fresh / "model") == quiet


def test_a_lost_node(jobs: Jobs, slurm: Slurm, log: str, factors: str, quiet: dict[str, bytes], fresh: Path) -> None:
    """Slurm sees it after SlurmdTimeout, requeues the job, and starts it when the node is back."""
    job = jobs.submit("train", *training(log, factors, fresh / "model"))
    started(jobs, job, fresh / "model")
    slurm.kill_node(NODES[1])
    try:
        jobs.wait(job, "PENDING", "REQUEUED", seconds=120)
    finally:
        slurm.start_node(NODES[1])
    jobs.soon(job)
    assert jobs.wait(job, "COMPLETED", "FAILED", "CANCELLED") == "COMPLETED", jobs.log(job)
    assert weights(fresh / "model") == quiet


def test_a_link_that_is_down_for_a_while(
    jobs: Jobs, slurm: Slurm, log: str, factors: str, quiet: dict[str, bytes], fresh: Path
) -> None:
    job = jobs.submit("train", *training(log, factors, fresh / "model"))
    started(jobs, job, fresh / "model")
    slurm.link(NODES[1], up=False)
    time.sleep(6)
    slurm.link(NODES[1], up=True)
    assert jobs.wait(job) == "COMPLETED", jobs.log(job)
    assert weights(fresh / "model") == quiet


def test_scancel_and_requeue(
    jobs: Jobs, slurm: Slurm, log: str, factors: str, quiet: dict[str, bytes], fresh: Path
) -> None:
    job = jobs.submit("train", *training(log, factors, fresh / "model"))
    started(jobs, job, fresh / "model")
    slurm.run(["scontrol", "requeue", job])
    jobs.wait(job, "PENDING", "REQUEUED", "COMPLETING", seconds=90)
    jobs.soon(job)
    assert jobs.wait(job, "COMPLETED", "FAILED", "CANCELLED") == "COMPLETED", jobs.log(job)
    assert weights(fresh / "model") == quiet

    cancelled = jobs.submit("train", *training(log, factors, fresh / "other" / "model"))
    started(jobs, cancelled, fresh / "other" / "model")
    jobs.torchx("cancel", f"slurm://torchx/{cancelled}")
    assert jobs.wait(cancelled) == "CANCELLED"
    wait_until(lambda: not any(jobs.workers(node, "train") for node in NODES), "all workers end", 60)
    assert not (fresh / "other" / "model").exists()


def test_a_signal_before_the_time_is_up(
    jobs: Jobs, slurm: Slurm, log: str, factors: str, quiet: dict[str, bytes], fresh: Path
) -> None:
    """What `SBATCH_SIGNAL=USR1@...` sends: a checkpoint, an exit that says so, and the requeued job goes on there."""
    job = jobs.submit("train", *training(log, factors, fresh / "model"), options=("--max_retries", "1"))
    started(jobs, job, fresh / "model")
    slurm.run(["scancel", "--signal=USR1", job])
    jobs.wait(job, "PENDING", "REQUEUED", seconds=60)
    said = jobs.log(job)
    assert "SIGUSR1: stopping after this step" in said
    assert list((fresh / "model.checkpoints").glob("step-*"))
    jobs.soon(job)
    assert jobs.wait(job, "COMPLETED", "FAILED", "CANCELLED") == "COMPLETED", jobs.log(job)
    assert weights(fresh / "model") == quiet
