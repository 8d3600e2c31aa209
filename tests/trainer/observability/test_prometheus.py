"""The Prometheus endpoint of a run."""

import json
import socket
import urllib.error
import urllib.request

import pytest

from recpress.data.errors import InputError
from recpress.trainer.cli import main
from recpress.trainer.config import WatchConfig
from recpress.trainer.loop.config import FitConfig
from recpress.trainer.loop.fit import fit
from recpress.trainer.loop.optimizer import TrainOptimizer
from recpress.trainer.loop.training_data import TrainingData
from recpress.trainer.observability.metrics_log import MetricsLog
from recpress.trainer.observability.prometheus import Endpoint
from tests.ranks import run_on_ranks
from tests.trainer.small import CPU, batches, sharded


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def scrape(port):
    """{series: value} of a real request."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))}


class StreamOfTest:
    rows = None

    def stats(self):
        return self

    def as_dict(self):
        return {"rows_per_second": 5e6, "share of.wait": 0.25}


def watched(port):
    """What the endpoint says, and the losses, of a run of two epochs of six steps."""
    dmp, optimizer = sharded("frozen")
    settings = FitConfig(epochs=2, evaluate_every=1, log_every=4, metric="NDCG@10")
    endpoint = Endpoint(port, "127.0.0.1", lambda: 3)
    try:
        with MetricsLog(None, endpoint=endpoint) as log:
            evaluate = lambda: {"NDCG@10": 0.25}  # noqa: E731
            given = {"evaluate": evaluate, "log": log, "data": TrainingData(StreamOfTest())}
            result = fit(dmp, optimizer, batches, settings, device=CPU, show_progress=False, **given)
        return scrape(port), result.losses
    finally:
        endpoint.close()


def test_endpoint():
    port = free_port()
    [(series, losses)] = run_on_ranks(watched, 1, port)
    assert series["recpress_step"] == 12
    assert series["recpress_train_epoch"] == 2
    assert series["recpress_train_loss"] == pytest.approx(losses[-1])
    assert series["recpress_train_rows_per_second"] > 0
    assert series["recpress_train_learning_rate"] > 0
    assert 0 <= series["recpress_train_waiting"] == series["recpress_train_waiting_slowest"] <= 1
    assert series["recpress_stream_rows_per_second"] == 5e6
    assert series["recpress_stream_share_of_wait"] == 0.25
    assert series['recpress_evaluation{metric="NDCG@10"}'] == 0.25
    assert series["recpress_checkpoint_failures_total"] == 3
    with pytest.raises(urllib.error.URLError):  # closed with the run
        scrape(port)


def test_port_in_use():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=f"watch.port {port} on watch.address 127.0.0.1: Address already in use"):
            Endpoint(port, "127.0.0.1")


def test_bad_port():
    with pytest.raises(InputError, match=r"watch\.port is 70000, expected 0 to 65535"):
        WatchConfig(port=70000)


def test_train_serves_while_it_runs(tmp_path, monkeypatch):
    log, port, seen = tmp_path / "log", free_port(), []
    synth = ["--users", "100", "--items", "50", "--rows", "1200", "--tastes", "4", "--negatives", "9"]
    assert main(["synth", "--out", str(log), *synth]) == 0
    step = TrainOptimizer.step

    def looked(self):
        step(self)
        seen.append(scrape(port))

    monkeypatch.setattr(TrainOptimizer, "step", looked)
    tables = ["--model.tables.strategy", "random", "--model.tables.dim", "8", "--sample.rate", "1", "--epochs", "2"]
    batch = ["--stream.batch-size", "250", "--negatives.count", "8", "--model.loss.candidates", "0"]
    out = ["--data", str(log), "--out", str(tmp_path / "model"), "--no-tensorboard", "--device", "cpu"]
    looks = ["--evaluation.every-steps", "2", "--evaluation.every", "0", "--evaluation.validation", "test"]
    looks += ["--profile.steps", "2", "--evaluation.patience", "2"]
    assert main(["train", *out, *tables, *batch, *looks, "--profile.start", "1", "--watch.port", str(port)]) == 0
    assert seen[0]["recpress_step"] == 0
    assert seen[-1]["recpress_train_epoch"] in (1, 2)
    assert seen[-1]["recpress_train_ne"] > 0
    assert 0 < seen[-1]["recpress_train_auc"] < 1
    assert seen[-1]["recpress_checkpoint_failures_total"] == 0
    with pytest.raises(urllib.error.URLError):
        scrape(port)
    lines = [json.loads(line) for line in (tmp_path / "model" / "metrics.jsonl").read_text().splitlines()]
    looked = {line["step"]: line["evaluate/NDCG@10"] for line in lines if "evaluate/NDCG@10" in line}
    assert list(looked) == [*range(0, 2 * len(looked), 2)]
    assert len(looked) > 1
    manifest = json.loads((tmp_path / "model" / "manifest.json").read_text())
    assert manifest["metrics"]["NDCG@10"] == max(looked.values())  # the weights of the best evaluation
    assert sum("train/waiting" in line and "train/ne" in line for line in lines) >= len(looked) - 1
    assert json.loads((tmp_path / "model" / "profile" / "breakdown.json").read_text())["steps"] == 2
