"""States of any shapes and dtypes, cut and joined again by DCP, on plain files."""

import contextlib
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import xxhash
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.distributed._shard.metadata import ShardMetadata
from torch.distributed._shard.sharded_tensor import Shard, ShardedTensor
from torch.distributed.checkpoint.api import CheckpointException

from recpress.trainer.checkpoint import dcp_storage
from recpress.trainer.checkpoint import staged as staged_module
from recpress.trainer.checkpoint.file_bytes import PAGE, describe
from recpress.trainer.checkpoint.staged import Staged
from tests.ranks import run_on_ranks

DTYPES = [
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
]


def filled(shape, dtype, seed):
    """Random bytes; NaNs too, so that only bits can be compared."""
    if dtype == torch.bool:
        return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.5
    count = math.prod(shape) * dtype.itemsize
    found = torch.randint(0, 256, (count,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return found.view(dtype).view(shape)


def same(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and bits(a) == bits(b)


def bits(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8).tolist()


shapes = st.one_of(
    st.lists(st.integers(0, 5), max_size=3),
    st.tuples(st.integers(1, 3), st.sampled_from([1, 63, 1023, 4097, 20_000])),  # pages, and gaps between them
)


def save(state, staged, folder, group):
    layout = dcp_storage.lay_out(state, group)
    staged.copy(state, layout.ranges)
    return dcp_storage.write(layout, staged, folder)


def roundtrips(folder):
    counter = iter(range(10**6))

    @settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.lists(st.tuples(shapes, st.sampled_from(DTYPES)), max_size=8))
    def check(wanted):
        number = next(counter)
        state = {f"t{k}": filled(tuple(shape), dtype, k) for k, (shape, dtype) in enumerate(wanted)}
        place = Path(folder) / str(number)
        assert save(state, staged, place, None) == {path.name: describe(path) for path in place.iterdir()}
        empty = {name: torch.zeros_like(value) for name, value in state.items()}
        dcp_storage.load(empty, place, None)
        for name, value in state.items():
            assert same(empty[name], value), name
        assert dcp_storage.names(place) == {name: tuple(value.shape) for name, value in state.items()}

    staged = Staged()  # one for all: its memory is used again
    check()


def test_what_was_saved_is_loaded_to_the_bit(tmp_path):
    run_on_ranks(roundtrips, 1, tmp_path)


def sharded(whole, cuts, group):
    """Rows `cuts[rank]` to `cuts[rank + 1]` on each rank."""
    rank = dist.get_rank(group)
    first, last = cuts[rank : rank + 2]
    meta = ShardMetadata([first, 0], [last - first, whole.shape[1]], placement=f"rank:{rank}/cpu")
    shards = [Shard(whole[first:last].clone(), meta)]
    return ShardedTensor._init_from_local_shards(shards, list(whole.shape), process_group=group)


WHOLE = {"table": filled((1500, 33), torch.float32, 1), "small": filled((2, 3), torch.bfloat16, 2)}
CUTS = {
    1: {"table": [0, 1500], "small": [0, 2]},
    2: {"table": [0, 1, 1500], "small": [0, 2, 2]},
    3: {"table": [0, 700, 1499, 1500], "small": [0, 1, 2, 2]},
}


def state_of(values, group):
    cuts = CUTS[dist.get_world_size(group)]
    state = {name: sharded(value, cuts[name], group) for name, value in values.items()}
    for k in range(20):  # on all ranks; each writes some of them
        state[f"dense{k}"] = filled((17 * k,), torch.float32, k)
    return state


def save_on(group, folder):
    rank = dist.get_rank(group)
    mine = [f"tensors-{rank}.bin", dcp_storage.TENSORS][: 2 - min(rank, 1)]
    written = save(state_of(WHOLE, group), Staged(), folder, group)
    assert written == {name: describe(folder / name) for name in mine}
    assert written[f"tensors-{rank}.bin"]["size"] % PAGE == 0


def load_on(group, folder):
    expected = state_of(WHOLE, group)
    state = state_of({name: torch.zeros_like(value) for name, value in WHOLE.items()}, group)
    for name in state:
        if name.startswith("dense"):
            state[name].zero_()
    dcp_storage.load(state, folder, group)
    for name, value in expected.items():
        if isinstance(value, ShardedTensor):
            for mine, theirs in zip(state[name].local_shards(), value.local_shards(), strict=True):
                assert same(mine.tensor, theirs.tensor), name
        else:
            assert same(state[name], value), name


def any_to_any(folder):
    groups = {world: dist.new_group(list(range(world))) for world in (1, 2, 3)}
    mine = {world: group for world, group in groups.items() if dist.get_rank() < world}
    for world, group in mine.items():
        save_on(group, Path(folder) / str(world))
    dist.barrier()
    for group in mine.values():
        for world in groups:
            load_on(group, Path(folder) / str(world))


def test_any_number_of_ranks_loads_what_any_number_saved(tmp_path):
    """Empty shards too."""
    run_on_ranks(any_to_any, 3, tmp_path)
    for world in CUTS:
        folder = tmp_path / str(world)
        content = json.loads((folder / dcp_storage.TENSORS).read_text())
        wanted = sum(chunk["length"] for entry in content.values() for chunk in entry["chunks"])
        written = [path.stat().st_size for path in folder.glob("*.bin")]
        assert len(written) == world
        assert wanted < sum(written) < 1.25 * wanted  # of 200 kB: a few pages, no tensor twice


def cut_short(folder):
    state = {"a": torch.ones(5000)}
    save(state, Staged(), Path(folder), None)
    with open(Path(folder) / "tensors-0.bin", "r+b") as file:
        file.truncate(10_000)
    with pytest.raises(CheckpointException, match=r"tensors-0.bin: ends too early"):
        dcp_storage.load(state, Path(folder), None)


def test_a_file_that_ends_too_early_is_named(tmp_path):
    run_on_ranks(cut_short, 1, tmp_path)


def test_memory_serves_for_a_smaller_state_and_goes_before_a_larger_comes():
    staged = Staged()
    staged.copy({"a": torch.ones(5000), "b": torch.ones(())}, {("a", (0,)): (0, 20_000), ("b", ()): (20_032, 4)})
    first, nbytes = staged._memory.data_ptr(), staged.nbytes
    assert first % PAGE == 0
    assert staged.size == nbytes == 5 * PAGE
    staged.copy({"a": torch.zeros(100)}, {("a", (0,)): (0, 400)})
    assert staged.size == PAGE
    assert (staged._memory.data_ptr(), staged.nbytes) == (first, nbytes)
    staged.copy({"a": torch.zeros(50_000)}, {("a", (0,)): (0, 200_000)})
    assert staged.nbytes == 49 * PAGE


@pytest.mark.parametrize("block", [64, 1000, 20_000, 1 << 20])
@pytest.mark.parametrize("alone", [False, True])
def test_the_checksum_made_while_copying_is_that_of_what_was_copied(monkeypatch, block, alone):
    """Parts of all sizes beside a block's, gaps between them, and memory that another state has left full."""
    if alone:  # the thread from the back comes too late
        monkeypatch.setattr(Staged, "_copy_back", lambda staged, blocks: None)
    monkeypatch.setattr("recpress.trainer.checkpoint.staged._BLOCK", block)
    state = {
        f"t{k}": filled((size,), torch.uint8, k) for k, size in enumerate([1, block - 1, block, 0, block + 1, 5000])
    }
    ranges, end = {}, 0
    for name, value in state.items():
        ranges[name, (0,)] = (end, len(value))
        end += -(-len(value) // 64) * 64
    staged = Staged()
    staged.copy({"a": filled((end + 5 * PAGE,), torch.uint8, 9)}, {("a", (0,)): (0, end + 5 * PAGE)})
    staged.copy(state, ranges)
    if alone:
        assert 0 <= sum(ranges["t5", (0,)]) - staged.summed < block
    assert staged.checksum.digest() == xxhash.xxh3_128(staged.content[: staged.summed]).digest()
    for name, value in state.items():
        begin, length = ranges[name, (0,)]
        assert bytes(staged.content[begin : begin + length]) == value.numpy().tobytes()


class Queue:
    """A CUDA stream that copies only when someone waits for it, and the events on it."""

    def __init__(self, *_):
        self.waits = 0

    def wait_stream(self, stream):
        self.waits += 1

    def record(self, stream):
        self.recorded = True

    def synchronize(self):
        assert self.recorded


@pytest.mark.parametrize("sizes", [[5], [100, 3, 250], [100] * 7])
def test_blocks_of_a_gpu_go_through_two_buffers(device, monkeypatch, sizes):
    if device.type == "cpu":
        monkeypatch.setattr(torch.cuda, "Stream", Queue)
        monkeypatch.setattr(torch.cuda, "Event", Queue)
        monkeypatch.setattr(torch.cuda, "current_stream", Queue)
        monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)
        plain = torch.empty
        monkeypatch.setattr(torch, "empty", lambda *size, pin_memory=False, **options: plain(*size, **options))
    monkeypatch.setattr(staged_module, "_STAGE", 100)
    parts = {f"t{k}": torch.randint(256, (size,), dtype=torch.uint8).to(device) for k, size in enumerate(sizes)}
    begins = np.cumsum([0, *sizes])
    ranges = {(name, (0,)): (int(begins[k]), sizes[k]) for k, name in enumerate(parts)}
    staged = Staged()
    monkeypatch.setattr(staged_module, "_BLOCK", 100)
    if device.type == "cpu":
        staged._memory = torch.zeros(int(begins[-1]), dtype=torch.uint8)
        staged._copy_from_device(list(staged_module._blocks(parts, ranges)))
    else:
        staged.copy(parts, ranges)
    found = staged._memory[: begins[-1]]
    assert torch.equal(found, torch.cat([part.cpu() for part in parts.values()]))
