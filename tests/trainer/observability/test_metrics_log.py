"""The scalars of a run as JSON lines, over several starts of the run."""

import json

from recpress.trainer.observability.metrics_log import MetricsLog, status_line
from tests.ranks import run_on_ranks


def logs(folder):
    with MetricsLog(folder, tensorboard=False) as log:
        for step in (1, 2, 3):
            log.write(step, {"train/loss": 1.0 / step})
    with MetricsLog(folder, tensorboard=False) as log:
        log.cut(2)
        log.write(3, {"train/loss": 9.0})


def test_a_resumed_run_replaces_lines_after_its_checkpoint(tmp_path):
    run_on_ranks(logs, 2, str(tmp_path))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["train/loss"]) for line in lines] == [(1, 1.0), (2, 0.5), (3, 9.0)]
    seconds = [line["seconds"] for line in lines]
    assert seconds == sorted(seconds)


def test_the_status_line_has_the_most_important_scalars():
    scalars = {"train/loss": 0.5, "train/learning_rate": 1e-3, "train/rows_per_second": 12_345.0, "train/epoch": 1}
    scalars |= {"train/waiting": 0.032, "train/ne": 0.81234, "train/auc": 0.9}
    assert status_line(scalars) == "loss 0.5000, lr 1.00e-03, 12,345 rows/s, waiting 3%, NE 0.812, AUC 0.900"
