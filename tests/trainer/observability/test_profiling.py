"""The profile of steps: how the parts are told apart, and what a run writes."""

import gzip
import json
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
from recpress.trainer.observability import step_parts as parts
from recpress.trainer.observability.profiling import Profiler
from recpress.trainer.observability.step_parts import step_parts
from tests.ranks import run_on_ranks
from tests.trainer import small


def event(name, begin, end, tid=1, cat="cpu_op", **args):
    return {"ph": "X", "name": name, "ts": begin, "dur": end - begin, "tid": tid, "cat": cat, "args": args}


def ranges(*given, tid=1):
    return [event(name, begin, end, tid, "user_annotation") for name, begin, end in given]


HOST = [
    {"ph": "M", "name": "process_name"},
    *ranges(
        ("ProfilerStep#7", 1000, 2000),
        ("## start_sparse_data_dist 8 ##", 1000, 1100),
        ("## input_postproc <class 'MappedRows'> 8 ##", 1010, 1050),
        ("## copy_batch_to_gpu 9 ##", 1100, 1210),
        (parts.DATA, 1105, 1205),
        ("## forward 7 ##", 1210, 1500),
        ("[lookup]_[user]_[row_wise]", 1220, 1260),
        ("## EmbeddingBagCollectionAwaitable wait() ##", 1300, 1330),
        ("## backward 7 ##", 1500, 1800),
        ("## optimizer 7 ##", 1800, 1850),
        (parts.PAUSE, 1900, 1990),
        ("ProfilerStep#8", 2000, 3000),
    ),
    event("aten::index_select", 1020, 1040),
    event("aten::mm", 1270, 1290),
    event("autograd::engine::evaluate_function: CppNode<SplitLookupFunction_rowwise_adagrad>", 1500, 1540),
    event("autograd::engine::evaluate_function: MmBackward0", 1540, 1640),
    event("c10d::allreduce_", 1630, 1640),
    event("[lookup]_[user]_[row_wise]", 1910, 1980),  # of the evaluation
    *ranges(("gloo:all_to_all", 1310, 1400), ("gloo:all_reduce", 1635, 1790), tid=2),
]


def test_each_moment_of_the_trainers_thread_belongs_to_one_part():
    found = step_parts(HOST, 1)
    expected = {
        parts.WAITING: 100,
        parts.REMAPPING: 40,
        parts.IDS: 60,
        parts.VECTORS: 30,
        parts.SUMS: 10 + 150,  # the call, and the wait until 1790
        parts.LOOKUP: 40 + 40,
        parts.FORWARD: 290 - 70,
        parts.BACKWARD: 90 + 10,
        parts.OPTIMIZER: 50,
        parts.OTHER: 10 + 150,
    }
    assert found == pytest.approx({part: value / 1000 for part, value in expected.items()})
    assert sum(found.values()) == pytest.approx(1.0)


def test_more_steps_are_a_mean_and_too_few_are_said():
    assert sum(step_parts(HOST, 2).values()) == pytest.approx(1.0)
    with pytest.raises(ValueError, match="the trace has 2 steps, expected 3"):
        step_parts(HOST, 3)


def test_on_a_gpu_the_parts_are_those_of_the_device():
    """The host runs ahead: a kernel belongs to the range in which it was launched."""
    trace = [
        *ranges(
            ("ProfilerStep#1", 0, 1000),
            ("## forward 1 ##", 0, 200),
            ("[lookup]_[user]", 10, 60),
            ("[output_dist]_[user]", 70, 90),
            (parts.DATA, 300, 950),
        ),
        event("cudaLaunchKernel", 20, 25, cat="cuda_runtime", correlation=1),
        event("cudaLaunchKernel", 75, 80, cat="cuda_runtime", correlation=2),
        event("cudaLaunchKernel", 100, 105, cat="cuda_runtime", correlation=3),
        event("autograd::engine::evaluate_function: MmBackward0", 210, 240, tid=5),
        event("cudaLaunchKernel", 220, 225, tid=5, cat="cuda_runtime", correlation=4),
        event("ncclDevKernel_SendRecv", 150, 450, tid=20, cat="kernel", correlation=2),
        event("embedding_forward", 100, 200, tid=7, cat="kernel", correlation=1),
        event("gemm", 300, 400, tid=7, cat="kernel", correlation=3),
        event("gemm", 450, 600, tid=7, cat="kernel", correlation=4),
        event("ncclDevKernel_AllReduce_Sum_f32", 500, 700, tid=21, cat="kernel", correlation=9),
        event("Memcpy HtoD", 690, 720, tid=22, cat="gpu_memcpy", correlation=10),
    ]
    found = {part: round(1000 * value) for part, value in step_parts(trace, 1).items() if value}
    assert found == {
        parts.LOOKUP: 100,
        parts.FORWARD: 100,
        parts.BACKWARD: 150,
        parts.VECTORS: 100 + 50,  # what no computation hides
        parts.SUMS: 100,
        parts.WAITING: 950 - 720,
        parts.OTHER: 100 + 20 + 50,
    }


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


def never(folder):
    said = []
    profiler = Profiler(ProfileConfig(steps=3, start=20), folder, small.CPU)
    profiler.say = said.append
    with profiler:
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
    said = []
    with Profiler(ProfileConfig(steps=2, start=1), folder, small.CPU) as profiler:
        profiler.say = said.append
        for _ in range(6):
            profiler.step()
    return said


def test_a_profile_that_cannot_be_written_is_said_and_the_run_goes_on(tmp_path):
    [[said]] = run_on_ranks(without_a_folder, 1, tmp_path)
    assert said.startswith("warning: no profile: rank 0: [Errno 17] File exists")
