"""How a trace is cut into the parts of a step."""

import pytest

from recpress.trainer.observability import step_parts as parts
from recpress.trainer.observability.step_parts import step_parts


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
