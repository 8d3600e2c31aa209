import io

import torch.distributed as dist

from recpress.trainer.observability.progress import Progress
from tests.ranks import run_on_ranks


def lines():
    """What a log file gets of a run that goes on at step 50."""
    stream = io.StringIO()
    progress = Progress(100, "train", stream=stream)
    progress.skip(50)
    scalars = {"train/loss": 0.5, "train/learning_rate": 1e-3, "train/rows_per_second": 12_345.0, "train/epoch": 1}
    progress.update(25, scalars | {"train/waiting": 0.032, "train/ne": 0.81234, "train/auc": 0.9})
    progress.say("epoch 1, step 75: HR@10 0.5")
    progress.close()
    return dist.get_rank(), stream.getvalue()


def test_a_file_gets_plain_lines_and_only_from_rank_0():
    first, second = run_on_ranks(lines, 2)
    status, said = first[1].splitlines()
    assert status.startswith(
        "train: step 75 of 100 (75%), loss 0.5000, lr 1.00e-03, 12,345 rows/s, waiting 3%, NE 0.812, AUC 0.900, 00:0"
    )
    assert status.endswith(" left")
    assert said == "epoch 1, step 75: HR@10 0.5"
    assert "\r" not in first[1]
    assert second == (1, "")
