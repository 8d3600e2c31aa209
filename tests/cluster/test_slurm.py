"""A real Slurm of two nodes: the stages on 2 x 2 ranks, and what becomes of a run when a part of it is lost."""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from recpress.data.config import SynthConfig, SynthCriteoConfig
from recpress.data.synthetic.criteo import synth_criteo
from recpress.data.synthetic.interactions import synth
from recpress.modules import IdMap
from tests.cluster.conftest import ROOT, Jobs, weights
from tests.cluster.slurm import NODES, Slurm, wait_until

FACTORS = ("--als.factors", "8", "--als.sweeps", "3")
NETWORK = (
    *("--stream.batch-size", "64", "--negatives.count", "16", "--model.towers.hidden", "16", "--sample.rate", "1"),
    *("--model.tables.strategy", "warm-start", "--model.tables.dim", "8", "--no-tensorboard"),
    *("--evaluation.every", "0"),  # otherwise factors that have seen the validation rows are kept, without a step
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
    where = ("--data", log, "--factors", factors, "--out", str(out))
    return (*where, *NETWORK, "--epochs", "4", "--checkpoint.steps", "20", *more)


@pytest.fixture(scope="session")
def quiet(jobs: Jobs, log: str, factors: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The weights of a run that nothing befell."""
    out = tmp_path_factory.mktemp("quiet") / "model"
    jobs.run("train", *training(log, factors, out))
    return weights(out)


def started(jobs: Jobs, job: str, out: Path) -> None:
    """Return when the job has trained for some steps and has a checkpoint of them."""

    def some() -> bool:
        trained = any(path.read_text().count("\n") >= 2 for path in out.parent.rglob("metrics.jsonl"))
        return trained and any(out.with_name(f"{out.name}.checkpoints").glob("step-*/manifest.json"))

    try:
        wait_until(some, f"job {job} trains", 240)
    except TimeoutError as error:
        error.add_note(jobs.log(job))
        raise


def went_on(jobs: Jobs, job: str, out: Path, quiet: dict[str, bytes]) -> None:
    """The job ends well, after it went on from a checkpoint, with the weights of the quiet run."""
    assert jobs.wait(job) == "COMPLETED", jobs.log(job)
    assert f"resuming from checkpoint {out}.checkpoints/step-" in jobs.log(job)
    assert weights(out) == quiet


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
    assert f"factorize: {out}/factors is complete" in jobs.log(job)
    assert sorted(path.name for path in out.iterdir()) == ["factors", "metrics.json", "model"]


def test_a_killed_worker(jobs: Jobs, log: str, factors: str, quiet: dict[str, bytes], fresh: Path) -> None:
    job = jobs.submit("train", *training(log, factors, fresh / "model"))
    started(jobs, job, fresh / "model")
    os.kill(jobs.workers(NODES[1], "train")[0], signal.SIGKILL)
    went_on(jobs, job, fresh / "model", quiet)


def test_a_lost_node(jobs: Jobs, slurm: Slurm, log: str, factors: str, quiet: dict[str, bytes], fresh: Path) -> None:
    """Slurm sees it after SlurmdTimeout, requeues the job, and starts it when the node is back."""
    job = jobs.submit("train", *training(log, factors, fresh / "model"))
    started(jobs, job, fresh / "model")
    slurm.kill_node(NODES[1])
    try:
        jobs.wait(job, "PENDING", "REQUEUED", seconds=240)
    finally:
        slurm.start_node(NODES[1])
    went_on(jobs, job, fresh / "model", quiet)


def test_a_link_that_is_down_for_a_while(
    jobs: Jobs, slurm: Slurm, log: str, factors: str, quiet: dict[str, bytes], fresh: Path
) -> None:
    """TCP waits, and so does the run; nothing is started anew."""
    job = jobs.submit("train", *training(log, factors, fresh / "model"))
    started(jobs, job, fresh / "model")
    slurm.link(NODES[1], up=False)
    time.sleep(6)
    slurm.link(NODES[1], up=True)
    assert jobs.wait(job) == "COMPLETED", jobs.log(job)
    assert "resuming from checkpoint" not in jobs.log(job)
    assert weights(fresh / "model") == quiet


def test_a_link_that_is_down_for_longer_than_a_step_may_take(
    jobs: Jobs, slurm: Slurm, log: str, factors: str, quiet: dict[str, bytes], fresh: Path
) -> None:
    """The ranks end with an error that says so, and the job goes on when it is started anew."""
    settings = training(log, factors, fresh / "model", "--stall-seconds", "8")
    job = jobs.submit("train", *settings, options=("--max_retries", "2"))
    started(jobs, job, fresh / "model")
    slurm.link(NODES[1], up=False)
    time.sleep(25)
    slurm.link(NODES[1], up=True)
    wait_until(lambda: " stalled" in jobs.log(job) or "all ranks wait" in jobs.log(job), "a rank is named", 120)

    # torchrun may start the ranks again by itself; or the job fails, and TorchX's script requeues it
    wait_until(lambda: "resuming from checkpoint" in jobs.log(job), "the job is started anew", 240, every=1)
    went_on(jobs, job, fresh / "model", quiet)


def test_scancel_and_requeue(
    jobs: Jobs, slurm: Slurm, log: str, factors: str, quiet: dict[str, bytes], fresh: Path
) -> None:
    job = jobs.submit("train", *training(log, factors, fresh / "model"))
    started(jobs, job, fresh / "model")
    slurm.run(["scontrol", "requeue", job])
    jobs.wait(job, "PENDING", "REQUEUED", "COMPLETING", seconds=240)
    went_on(jobs, job, fresh / "model", quiet)

    cancelled = jobs.submit("train", *training(log, factors, fresh / "other" / "model"))
    started(jobs, cancelled, fresh / "other" / "model")
    jobs.torchx("cancel", f"slurm://torchx/{cancelled}")
    assert jobs.wait(cancelled) == "CANCELLED"
    wait_until(lambda: not any(jobs.workers(node, "train") for node in NODES), "all workers end", 120)
    assert not (fresh / "other" / "model").exists()


def test_a_signal_before_the_time_is_up(
    jobs: Jobs, slurm: Slurm, log: str, factors: str, quiet: dict[str, bytes], fresh: Path
) -> None:
    """What `SBATCH_SIGNAL=USR1@...` sends: a checkpoint, an exit that says so, and the requeued job goes on there."""
    job = jobs.submit("train", *training(log, factors, fresh / "model"), options=("--max_retries", "1"))
    started(jobs, job, fresh / "model")
    slurm.run(["scancel", "--signal=USR1", job])
    jobs.wait(job, "PENDING", "REQUEUED", seconds=240)
    said = jobs.log(job)
    assert "SIGUSR1: stopping after this step" in said
    step = re.search(r"stopped by .* after step (\d+): ", said)
    assert step is not None, said
    went_on(jobs, job, fresh / "model", quiet)
    assert f"resuming from checkpoint {fresh}/model.checkpoints/step-{int(step[1]):08d}" in jobs.log(job)


def test_a_users_own_dlrm(jobs: Jobs, slurm: Slurm, fresh: Path) -> None:
    """Compressed, on a log of clicks; a killed rank and a signal before the time limit change nothing of its result."""
    script, log, out = str(ROOT / "examples" / "resumable_dlrm.py"), fresh / "log", fresh / "dlrm"
    synth_criteo(SynthCriteoConfig(rows=60_000, ids=4000), log)
    for name in ("C3", "C12"):
        ids = pq.read_metadata(log / "vocabulary" / f"feature-{name}.parquet").num_rows
        rows = torch.arange(ids, dtype=torch.int32)[:, None] % max(2, ids // 3)
        (fresh / "maps" / name).mkdir(parents=True)
        IdMap(rows=rows, num_rows=max(2, ids // 3)).save(fresh / "maps" / name)
    words = (script, "--data", str(log), "--maps", str(fresh / "maps"), "--global-batch", "256")
    words += ("--checkpoint-steps", "20", "--epochs", "2")
    quiet = jobs.log(jobs.run("script", *words, "--out", str(fresh / "quiet")))

    job = jobs.submit("script", *words, "--out", str(out), options=("--max_retries", "1"))
    wait_until(lambda: any(out.glob("step-*/.metadata")), f"job {job} has a checkpoint", 300)
    os.kill(jobs.workers(NODES[1], "resumable_dlrm.py")[0], signal.SIGKILL)
    wait_until(lambda: "resumed at step" in jobs.log(job), f"job {job} resumes", 300)
    slurm.run(["scancel", "--signal=USR1", job])
    jobs.wait(job, "PENDING", "REQUEUED", seconds=300)
    stopped = re.search(r"stopped after step (\d+)", jobs.log(job))
    assert stopped is not None, jobs.log(job)
    assert jobs.wait(job, seconds=600) == "COMPLETED", jobs.log(job)
    assert f"resumed at step {stopped[1]}" in jobs.log(job)
    result = r"step \d+: held-out log loss [\d.]+"
    assert re.findall(result, jobs.log(job)) == re.findall(result, quiet) != []
