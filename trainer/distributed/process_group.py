"""The process group of a run: one process without a launcher, or the ranks that torchrun started."""

from __future__ import annotations

import gc
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from recpress.data.errors import InputError
from recpress.modules.memory_hook import set_memory_hook
from recpress.trainer.allocator import malloc_trim
from recpress.trainer.distributed.heartbeat import barrier, heartbeat
from recpress.trainer.distributed.watchdog import NO_TIMEOUT, Watchdog
from recpress.trainer.errors import Preempted

logger = logging.getLogger(__name__)

STALL_SECONDS = 600.0
GPU = Path("/dev/nvidia0")
_JOIN_SECONDS = 630.0  # how long a rank waits for the others at the start


@dataclass(frozen=True)
class Ranks:
    """This process's rank, the world size, and the device it computes on."""

    rank: int
    world_size: int
    device: torch.device


_watchdog: Watchdog | None = None  # of the outermost block, if it has several ranks


@contextmanager
def process_group(device: str = "auto", stall_seconds: float | None = None) -> Iterator[Ranks]:
    """Join the ranks that torchrun started, or run as a single rank. Leave the group at the end.

    An inner block, in a stage that runs other stages, shares the group of the outer block with its own time limit.

    Create models in a function that is called inside the block, so that they are freed at its end. Otherwise DDP's
    reducer holds the last reference to the group. Its destructor then keeps the GIL while it waits for gloo's threads,
    which may need the GIL to free a tensor: a deadlock, seen in about 1 of 200 runs.

    Args:
        device: `auto` (CUDA if available), `cpu` or `cuda`.
        stall_seconds: time limit of a step, and of a rank without a heartbeat; default: 600, or that of the outer
            block.

    Raises:
        InputError: `cuda` without a CUDA device for this process, with the reason.
        RankFailed: on the other ranks, if one raises inside the block.
    """
    global _watchdog
    target = _device(device)
    silence_library_warnings()
    set_memory_hook(malloc_trim)  # a command owns its process
    if dist.is_initialized():
        with _watchdog.limit(stall_seconds) if _watchdog and stall_seconds is not None else nullcontext():
            yield Ranks(dist.get_rank(), dist.get_world_size(), target)
        return
    _join(target)
    ranks = Ranks(dist.get_rank(), dist.get_world_size(), target)
    heartbeat.outside_step()
    if ranks.world_size > 1:
        _watchdog = Watchdog(ranks.rank, ranks.world_size, STALL_SECONDS if stall_seconds is None else stall_seconds)
    try:
        yield ranks
        if _watchdog:
            barrier()  # stay until all ranks are done, to receive a failure of another
        gc.collect()  # models in reference cycles
    except Exception as error:
        together = isinstance(error, Preempted) and not error.alone
        if _watchdog and not together:
            _watchdog.failed(error)
        raise
    finally:
        if _watchdog:
            _watchdog.stop()
        _watchdog = None
        dist.destroy_process_group()


def _device(name: str) -> torch.device:
    if name == "cpu":
        return torch.device("cpu")
    problem = cuda_problem()
    if name == "cuda" and problem:
        raise InputError(f"device is cuda: {problem}; or expected cpu or auto")
    if problem:
        if GPU.exists() and "CUDA_VISIBLE_DEVICES" not in os.environ:
            logger.warning("computing on the CPU, although this machine has a GPU: %s", problem)
        return torch.device("cpu")
    local = int(os.environ.get("LOCAL_RANK", 0))
    if local >= torch.cuda.device_count():
        raise InputError(
            f"process {local} of this node has no CUDA device: there are {torch.cuda.device_count()}; "
            "expected no more processes than devices, or --device cpu"
        )
    return torch.device("cuda", local)


def cuda_problem() -> str | None:
    """Why torch cannot use CUDA here, and the fix; None if it can."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is a CPU build; expected the CUDA set: RECPRESS_SET=cuda scripts/install.sh"
    if torch.cuda.is_available():
        return None
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:  # no driver, one that is too old, no device
        text = " ".join(str(error).split()).partition(" Please check")[0]
        return f"{text}; expected a driver for CUDA {torch.version.cuda} and a GPU, see `nvidia-smi`"
    return "torch sees no CUDA device; expected a GPU, see `nvidia-smi`"


def _join(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    timeout = timedelta(seconds=_JOIN_SECONDS)
    if "WORLD_SIZE" in os.environ and "MASTER_ADDR" in os.environ:
        dist.init_process_group(backend, timeout=timeout)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    dist.distributed_c10d._set_pg_timeout(NO_TIMEOUT)


def silence_library_warnings() -> None:
    """Hide what TorchRec and torch print at every start about their own code; no user can act on it."""
    names = ["torchrec.distributed.planner.types", "torch.fx._symbolic_trace"]
    if not torch.cuda.is_available():  # "has no dist stream": the CPU has no streams
        names.append("torchrec.distributed.train_pipeline.postproc")
    for name in names:
        logging.getLogger(name).setLevel(logging.ERROR)
    for text in (".*broadcast_buffers.*", ".*reduce_scatter_tensor.*", ".*all_gather_into_tensor.*"):
        warnings.filterwarnings("ignore", message=text, category=FutureWarning)
