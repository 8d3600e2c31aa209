"""The Prometheus endpoint of a run."""

import socket
import urllib.error
import urllib.request

import pytest
from recpress.data.errors import InputError
from recpress.trainer.cli import main
from recpress.trainer.config import WatchConfig
from recpress.trainer.loop import FitConfig, fit
from recpress.trainer.metrics_log import MetricsLog
from recpress.trainer.optimizer import TrainOptimizer
from recpress.trainer.prometheus import Endpoint

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


def watched(port):
    """What the endpoint says, and the losses, of a run of two epochs of six steps."""
    dmp, optimizer = sharded("init-freeze")
    settings = FitConfig(epochs=2, evaluate_every=1, log_every=4, metric="NDCG@10")
    endpoint = Endpoint(port, "127.0.0.1", lambda: 3)
    try:
        with MetricsLog(None, endpoint=endpoint) as log:
            evaluate = lambda: {"NDCG@10": 0.25}  # noqa: E731
            result = fit(dmp, optimizer, batches, settings, device=CPU, evaluate=evaluate, log=log, show_progress=False)
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
    synth = ["--users", "100", "--items", "50", "--rows", "1200", "--tastes", "4", "--held-out-users", "0"]
    assert main(["synth", "--out", str(log), *synth]) == 0
    step = TrainOptimizer.step

    def looked(self):
        step(self)
        seen.append(scrape(port))

    monkeypatch.setattr(TrainOptimizer, "step", looked)
    tables = ["--model.tables.strategy", "random", "--model.tables.dim", "8", "--sample.rate", "1", "--epochs", "2"]
    batch = ["--stream.batch-size", "500", "--negatives.count", "8", "--model.loss.candidates", "0"]
    out = ["--data", str(log), "--out", str(tmp_path / "model"), "--no-tensorboard", "--device", "cpu"]
    assert main(["train", *out, *tables, *batch, "--watch.port", str(port)]) == 0
    assert seen[0]["recpress_step"] == 0
    assert seen[-1]["recpress_train_epoch"] == 1
    assert seen[-1]["recpress_checkpoint_failures_total"] == 0
    with pytest.raises(urllib.error.URLError):
        scrape(port)
