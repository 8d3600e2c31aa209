"""The profile of some steps: what a run writes."""

import gzip
import json
import logging
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from recpress.modules.hashing.id_map import IdMap
from recpress.modules.two_tower.model import TwoTower
from recpress.trainer.config import OptimizerConfig, ProfileConfig
from recpress.trainer.loop.config import FitConfig
from recpress.trainer.loop.fit import fit
from recpress.trainer.loop.optimizer import TrainOptimizer
from recpress.trainer.model.sharding import shard
from recpress.trainer.observability import profiling
from recpress.trainer.observability import step_parts as parts
from recpress.trainer.observability.profiling import Profiler
from recpress.trainer.observability.step_parts import step_parts
from tests.ranks import run_on_ranks
from tests.trainer import small


def mapped(strategy):
    """(model whose ids have maps, optimizer)."""
    rng = np.random.default_rng(4)
    sides = [
        small.SideSpec(
            key=side.key,
            rows=side.rows,
            dim=side.dim,
            map=IdMap(rows=torch.from_numpy(rng.integers(9, size=(side.rows, 1)).astype(np.int32)), num_rows=9),
        )
        for side in small.sides()
    ]
    torch.manual_seed(7)
    model = TwoTower(small.config(strategy, kind="mlp"), *sides, tables_device="meta")
    dmp = shard(model, small.CPU, batch_size=small.ROWS, learning_rate=0.1)
    dmp.module.load_factors(*small.factors())
    return dmp, TrainOptimizer(dmp, OptimizerConfig(learning_rate=0.01), 12)


def profiled(folder, steps, start=2):
    """(bits without a profile, bits with one, what was said)."""
    plain, optimizer = mapped("frozen+residual")
    fit(plain, optimizer, small.batches, FitConfig(epochs=2), device=small.CPU, show_progress=False)
    dmp, optimizer = mapped("frozen+residual")
    profiler = Profiler(ProfileConfig(steps=steps, start=start), folder, small.CPU)
    settings = FitConfig(epochs=2, log_every=3, evaluate_steps=4, metric="m", keep_best=False)
    given = {"evaluate": lambda: {"m": 0.0}, "profiler": profiler}
    fit(dmp, optimizer, small.batches, settings, device=small.CPU, show_progress=False, **given)
    return small.digest(plain), small.digest(dmp)


def read(folder, rank):
    with gzip.open(Path(folder) / "profile" / f"trace-rank-{rank}.json.gz") as file:
        return json.load(file)["traceEvents"]


def test_a_run_on_two_ranks_says_where_its_steps_went_and_ends_at_the_same_bits(tmp_path):
    for plain, watched in run_on_ranks(profiled, 2, tmp_path, 6):
        assert plain == watched
    found = json.loads((tmp_path / "profile" / "breakdown.json").read_text())
    assert (found["ranks"], found["first_step"], found["steps"]) == (2, 3, 6)
    assert sorted(path.name for path in (tmp_path / "profile").iterdir()) == [
        "breakdown.json",
        "trace-rank-0.json.gz",
        "trace-rank-1.json.gz",
    ]
    for rank, numbers in enumerate(found["by_rank"]):
        again = step_parts(read(tmp_path, rank), 6)
        assert again == pytest.approx({part: numbers[part] for part in parts.PARTS})
        # the marks of the loop and those of the profiler are set by two clocks, some calls apart
        assert sum(again.values()) == pytest.approx(numbers["step"], rel=0.1)
        assert all(again[part] > 0 for part in parts.PARTS)
    assert sum(part["share"] for part in found["parts"].values()) == pytest.approx(1.0)
    slowest = found["parts"][parts.LOOKUP]
    assert slowest["slowest_ms"] == found["by_rank"][slowest["slowest_rank"]][parts.LOOKUP]


def profiled_apart(folder):
    """Each rank is a machine of its own; on that of rank 0 lies an older trace."""
    own = Path(folder) / str(torch.distributed.get_rank())
    (own / "profile").mkdir(parents=True)
    (own / "profile" / "trace-rank-1.json.gz").write_bytes(b"of another profile")
    dmp, optimizer = small.sharded("warm-start")
    profiler = Profiler(ProfileConfig(steps=2, start=1), own, small.CPU)
    fit(dmp, optimizer, small.batches, FitConfig(), device=small.CPU, show_progress=False, profiler=profiler)


def test_traces_of_other_machines_come_to_rank_0(tmp_path):
    run_on_ranks(profiled_apart, 2, tmp_path)
    names = [sorted(path.name for path in (tmp_path / rank / "profile").iterdir()) for rank in "01"]
    assert names == [["breakdown.json", "trace-rank-0.json.gz", "trace-rank-1.json.gz"], ["trace-rank-1.json.gz"]]
    assert read(tmp_path / "0", 1) == read(tmp_path / "1", 1)


def test_a_run_that_ends_before_has_the_steps_that_there_were(tmp_path):
    run_on_ranks(profiled, 1, tmp_path, 50, 0)
    found = json.loads((tmp_path / "profile" / "breakdown.json").read_text())
    assert (found["first_step"], found["steps"]) == (1, 12)


@contextmanager
def messages():
    """What the profiler logs within the block."""
    found = []
    handler = logging.Handler()
    handler.emit = lambda record: found.append(record.getMessage())
    profiling.logger.addHandler(handler)
    profiling.logger.setLevel(logging.INFO)
    yield found
    profiling.logger.removeHandler(handler)


def never(folder):
    with messages() as said, Profiler(ProfileConfig(steps=3, start=20), folder, small.CPU) as profiler:
        for _ in range(12):
            profiler.step()
    return said


def test_a_run_that_ends_before_the_first_of_them_says_so(tmp_path):
    [said] = run_on_ranks(never, 1, tmp_path)
    assert said == ["no profile: the run ended after 12 steps, profile.start is 20"]
    assert list(tmp_path.iterdir()) == []


def fails(folder):
    def run():
        with Profiler(ProfileConfig(steps=9, start=0), folder, small.CPU) as profiler:
            profiler.step()
            raise RuntimeError("of the test")

    with pytest.raises(RuntimeError, match="of the test"):
        run()


def test_a_run_that_fails_leaves_no_part_of_a_profile(tmp_path):
    run_on_ranks(fails, 1, tmp_path)
    assert list(tmp_path.iterdir()) == []


def without_a_folder(folder):
    (Path(folder) / "profile").touch()
    with messages() as said, Profiler(ProfileConfig(steps=2, start=1), folder, small.CPU) as profiler:
        for _ in range(6):
            profiler.step()
    return said


def test_a_profile_that_cannot_be_written_is_said_and_the_run_goes_on(tmp_path):
    [[said]] = run_on_ranks(without_a_folder, 1, tmp_path)
    assert said.startswith("no profile: rank 0: [Errno 17] File exists")
