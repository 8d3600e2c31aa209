"""A step that runs out of memory: which part, what was predicted, what to reduce."""

import pytest
import torch

from recpress.trainer.cli import main
from recpress.trainer.errors import OutOfMemory
from recpress.trainer.loop.config import FitConfig
from recpress.trainer.loop.fit import fit
from recpress.trainer.loop.out_of_memory import in_step
from tests.ranks import run_on_ranks
from tests.trainer.small import CPU, batches, sharded

TEXT = "CUDA out of memory. Tried to allocate 40.00 GiB. GPU 0 has a total capacity of 79.10 GiB"


def exhausted(*_, **__):
    raise torch.OutOfMemoryError(TEXT)


def in_the_loss():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("recpress.modules.two_tower.losses.pair_scores", exhausted)
        dmp, optimizer = sharded("frozen")
        with pytest.raises(OutOfMemory) as raised:
            fit(dmp, optimizer, batches, FitConfig(epochs=1), device=CPU, show_progress=False)
    return str(raised.value)


def test_the_part_of_the_step_and_the_fix_are_named():
    [text] = run_on_ranks(in_the_loss, 1)
    assert text.startswith("out of memory in step 1, in the loss: CUDA out of memory. Tried to allocate 40.00 GiB")
    assert "--stream.batch-size" in text


def test_other_errors_stay_as_they_are():
    assert in_step(RuntimeError("shape mismatch"), 1) is None
    unknown = in_step(MemoryError("Unable to allocate 3 GiB"), 7)
    assert str(unknown).startswith("out of memory in step 7: Unable to allocate 3 GiB; expected fewer rows per batch")


def test_train_adds_what_the_plan_predicts(tmp_path, monkeypatch, capsys):
    log = tmp_path / "log"
    assert main(["synth", "--users", "200", "--items", "200", "--rows", "3000", "--out", str(log)]) == 0
    monkeypatch.setattr("recpress.trainer.loop.step.StepPipeline.progress", exhausted)
    options = ["--data", str(log), "--out", str(tmp_path / "model"), "--device", "cpu", "--model.tables.dim", "8"]
    assert main(["train", *options]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "out of memory in step 1" in error
    assert "`recpress plan` predicts" in error
    assert "GiB per rank: " in error
