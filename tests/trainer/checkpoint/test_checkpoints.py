import json
import os
import resource
import shutil
import signal
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from recpress.data.errors import InputError
from recpress.trainer.checkpoint.checkpoints import Checkpoints
from recpress.trainer.config import CheckpointConfig
from recpress.trainer.errors import Preempted
from recpress.trainer.loop import run_state
from recpress.trainer.loop.config import FitConfig
from recpress.trainer.loop.fit import fit
from tests.ranks import run_on_ranks
from tests.trainer.small import CPU, batches, digest, sharded

DESCRIBE = {"config": {"seed": 0, "stream": {"batch_size": 16}}, "inputs": {"log": "a"}, "global_batch": 32}


class Killed(RuntimeError):
    """Stands for kill -9: nothing of ours runs after it but what `finally` would."""


def train(folder, strategy="frozen+residual", crash=None, sigterm=None, world_of_signal=0, **config):
    """(bits of weights and optimizers, losses, evaluations, what was said) of a run that may go on from `folder`."""
    said = []
    dmp, optimizer = sharded(strategy, schedule="cosine")
    values = iter([0.5, 0.7, 0.6, 0.65, 0.64, 0.61])
    step = optimizer.step

    def counted_step():
        if crash is not None and optimizer.steps == crash:
            raise Killed
        step()
        if optimizer.steps == sigterm and dist.get_rank() == world_of_signal:
            os.kill(os.getpid(), signal.SIGTERM)

    optimizer.step = counted_step
    dmp.module.user_tower.mlp.register_forward_pre_hook(  # a random number each step: dropout
        lambda _, given: (torch.nn.functional.dropout(given[0], 0.5, dmp.training),)
    )
    checkpoints = Checkpoints(CheckpointConfig(**{"steps": 3, "minutes": 0, **config}), folder, DESCRIBE, said.append)
    looked = len(checkpoints.start.run["result"]["evaluations"]) if checkpoints.start else 0
    for _ in range(looked):
        next(values)
    settings = FitConfig(epochs=3, evaluate_every=1, evaluate_first=True, metric="m", log_every=4)
    with checkpoints:
        try:
            result = fit(
                dmp,
                optimizer,
                batches,
                settings,
                device=CPU,
                evaluate=lambda: {"m": next(values)},
                show_progress=False,
                checkpoints=checkpoints,
            )
        except Killed:
            checkpoints.wait()  # of a process that is really killed nothing would be left that writes
            raise
    bits = digest(dmp), [(n, t) for n, t in flat(run_state.trained(dmp, optimizer)).items()]
    found = [{k: v for k, v in e.items() if k != "train_seconds"} for e in result.evaluations]
    return bits, result.steps, result.rows, found, said


def flat(state):
    """This rank's tensors as lists."""
    return {
        name: [s.tensor.tolist() for s in value.local_shards()] if hasattr(value, "local_shards") else value.tolist()
        for name, value in state.items()
    }


def crashed(folder, strategy="frozen+residual", crash=None, keep=3):
    with pytest.raises(Killed):
        train(folder, strategy, crash, keep=keep)
    return sorted(path.name for path in Path(folder).iterdir())


def crash_then_resume(folder, strategy, crash):
    left = crashed(folder, strategy, crash)
    return left, train(folder, strategy)


@pytest.mark.parametrize(
    ("world", "strategy", "crash"),
    [(1, "frozen+residual", 8), (2, "warm-start", 10), (4, "frozen", 17), (1, "random", 12)],
)
def test_a_run_that_goes_on_ends_at_the_bits_of_one_that_was_never_stopped(tmp_path, world, strategy, crash):
    quiet = run_on_ranks(train, world, tmp_path / "quiet", strategy)
    for rank, (left, after) in enumerate(run_on_ranks(crash_then_resume, world, tmp_path / "b", strategy, crash)):
        assert f"step-{crash // 3 * 3:08d}" in left
        assert after[:4] == quiet[rank][:4]


def test_the_last_ones_are_kept_and_the_weights_of_the_best_evaluation(tmp_path):
    assert run_on_ranks(crashed, 1, tmp_path, "frozen+residual", 17, 2)[0] == [
        "best-00000006",
        "step-00000012",
        "step-00000015",
    ]


def damage(folder, how):
    crashed(folder, crash=11)
    newest = Path(folder) / "step-00000009"
    shard = newest / "tensors-0.bin"
    if how == "flipped bit":
        content = bytearray(shard.read_bytes())
        content[len(content) // 2] ^= 1
        shard.write_bytes(content)
    elif how == "short":
        os.truncate(shard, 100)
    elif how == "no manifest":
        (newest / "manifest.json").unlink()
    elif how == "half a manifest":
        os.truncate(newest / "manifest.json", 50)
    elif how == "no best":
        shutil.rmtree(Path(folder) / "best-00000006")
    return train(folder)


@pytest.mark.parametrize("how", ["flipped bit", "short", "no manifest", "half a manifest", "no best"])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(tmp_path, how):
    quiet = run_on_ranks(train, 1, tmp_path / "quiet")[0]
    *after, said = run_on_ranks(damage, 1, tmp_path / "b", how)[0]
    assert "step-00000009 is incomplete or corrupt, skipping" in said[0]
    assert tuple(after) == quiet[:4]


def a_later_one_is_damaged(folder):
    crashed(folder, crash=11)
    os.truncate(Path(folder) / "step-00000009" / "run.json", 5)
    with pytest.raises(Killed):
        train(folder, crash=9, keep=1, steps=4)
    return sorted(path.name for path in Path(folder).glob("step-*"))


def test_a_damaged_one_of_a_later_step_is_not_kept_instead_of_a_whole_one(tmp_path):
    assert run_on_ranks(a_later_one_is_damaged, 1, tmp_path) == [["step-00000008"]]


def whole(folder, save):
    """All of the state, gathered from the ranks, as rank 0 sees it; from a checkpoint, or after 5 steps saved to it."""
    dmp, optimizer = sharded("warm-start", layout="row_wise")
    checkpoints = Checkpoints(CheckpointConfig(steps=5, minutes=0), folder, DESCRIBE)
    state = run_state.trained(dmp, optimizer)
    if save:
        with checkpoints:
            fit(dmp, optimizer, batches, FitConfig(), device=CPU, show_progress=False, checkpoints=checkpoints)
        return None
    checkpoints.start.load(state, checkpoints.group)
    rows = []
    for name, value in sorted(state.items()):
        if hasattr(value, "local_shards"):
            parts = [(list(s.metadata.shard_offsets), s.tensor.tolist()) for s in value.local_shards()]
            every = [None] * dist.get_world_size()
            dist.all_gather_object(every, parts)
            rows.append((name, [row for _, part in sorted(p for of_rank in every for p in of_rank) for row in part]))
        else:
            rows.append((name, value.tolist()))
    return rows


def test_tables_and_optimizer_states_are_equal_on_any_number_of_ranks(tmp_path):
    run_on_ranks(whole, 2, tmp_path, True)
    one, two, three = (run_on_ranks(whole, world, tmp_path, False) for world in (1, 2, 3))
    assert one[0] == two[0] == two[1] == three[0]
    momentum = dict(one[0])["table-optimizer/user_tables.embedding_bags.user.weight/user.momentum1"]
    assert max(momentum) > 0


def stopped_by_signal(folder):
    with pytest.raises(Preempted, match=r"stopped by .* after step 6: rerun .* to resume from .*step-00000006"):
        train(folder, sigterm=5, world_of_signal=dist.get_world_size() - 1, steps=0)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    return train(folder)


def test_a_signal_on_one_rank_stops_all_after_the_same_step_with_a_checkpoint(tmp_path):
    quiet = run_on_ranks(train, 2, tmp_path / "quiet")
    for rank, after in enumerate(run_on_ranks(stopped_by_signal, 2, tmp_path / "b")):
        assert after[:4] == quiet[rank][:4]
        assert after[4] == []  # nothing was passed over


def without_space(folder):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        return train(folder, keep=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_where_nothing_can_be_written_the_run_goes_on_and_says_so(tmp_path):
    quiet = run_on_ranks(train, 1, tmp_path / "quiet")[0]
    *after, said = run_on_ranks(without_space, 1, tmp_path / "b")[0]
    assert tuple(after) == quiet[:4]
    assert "a checkpoint was not written" in said[0]
    assert "File too large" in said[0]
    assert "training continues, no checkpoint is complete yet" in said[0]
    assert [path.name for path in (tmp_path / "b").iterdir()] == []


def test_a_run_with_other_settings_or_inputs_is_refused_by_name(tmp_path):
    run_on_ranks(crashed, 1, tmp_path, "frozen+residual", 5)
    other = {"config": {"seed": 0, "stream": {"batch_size": 17}}}
    with pytest.raises(InputError, match=r"other settings \(stream.batch_size: 16 -> 17\)"):
        run_with(tmp_path, other)
    with pytest.raises(InputError, match=r"another log: fingerprint a, now b"):
        run_with(tmp_path, {"inputs": {"log": "b"}})
    allowed = {
        "config": DESCRIBE["config"] | {"stream": {"batch_size": 16, "num_threads": 4}, "checkpoint": {"keep": 9}}
    }
    run_with(tmp_path, allowed)


def open_with(folder, what):
    return Checkpoints(CheckpointConfig(), folder, DESCRIBE | what).start is not None


def run_with(folder, what):
    assert run_on_ranks(open_with, 1, folder, what) == [True]


def test_another_version_of_the_format_is_refused(tmp_path):
    run_on_ranks(crashed, 1, tmp_path, "frozen+residual", 5)
    path = tmp_path / "step-00000003" / "manifest.json"
    for version in (1, 99):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"version": version}))
        with pytest.raises(InputError, match=f"step-00000003: format version {version}; this release reads version 2"):
            run_with(tmp_path, {})


def test_a_folder_that_cannot_hold_checkpoints_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"file: cannot hold checkpoints"):
        run_with(tmp_path / "file", {})


def anew(folder):
    checkpoints = Checkpoints(CheckpointConfig(resume=False), folder, DESCRIBE)
    return checkpoints.start, sorted(path.name for path in Path(folder).iterdir())


def test_without_resume_it_starts_anew(tmp_path):
    run_on_ranks(crashed, 1, tmp_path, "frozen+residual", 5)
    assert run_on_ranks(anew, 1, tmp_path) == [(None, [])]
