"""Latency and bandwidth of an all-reduce: between the ranks of torchrun, or between two gloo ranks on this machine."""

from __future__ import annotations

import multiprocessing
import os
import socket
import time
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist

from recpress.data.errors import InputError
from recpress.trainer.distributed.process_group import Ranks, process_group

SMALL_BYTES, LARGE_BYTES = 4, 4 << 20
ROUNDS = 20


def between_launched_ranks(checks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The checks of all ranks, and one of their collectives. Collective."""
    with process_group("auto") as ranks:
        everyone: list[Any] = [None] * ranks.world_size
        dist.all_gather_object(everyone, checks)
        detail = _measure(ranks)
    found = [check for of_rank in everyone for check in of_rank]
    return [*found, {"name": "collectives", "status": "ok", "detail": detail, "rank": 0}]


def between_two_local_ranks(timeout_seconds: float) -> str:
    """The result of `_measure` between two processes of this machine.

    Raises:
        InputError: they fail, or take longer than `timeout_seconds`.
    """
    context = multiprocessing.get_context("spawn")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    receiver, sender = context.Pipe(duplex=False)
    processes = [context.Process(target=_local_rank, args=(rank, port, sender), daemon=True) for rank in range(2)]
    for process in processes:
        process.start()
    sender.close()
    try:
        if not receiver.poll(timeout_seconds):
            raise InputError(f"two gloo ranks on this machine did not finish within {timeout_seconds:g} s")
        ok, text = receiver.recv()
    except EOFError:
        raise InputError("two gloo ranks on this machine ended without a result; their output says why") from None
    finally:
        for process in processes:
            process.join(timeout=5)
            process.kill()
    if not ok:
        raise InputError(text)
    return str(text)


def _local_rank(rank: int, port: int, sender: Connection) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2"}
    torch.set_num_threads(1)
    try:
        with process_group("cpu") as ranks:
            text = _measure(ranks)
        if rank == 0:
            sender.send((True, text))
    except Exception as error:
        sender.send((False, f"rank {rank}: {type(error).__name__}: {' '.join(str(error).split())}"))


def _measure(ranks: Ranks) -> str:
    small, large = _seconds(ranks, SMALL_BYTES), _seconds(ranks, LARGE_BYTES)
    backend = "nccl" if ranks.device.type == "cuda" else "gloo"
    return (
        f"{backend}, {ranks.world_size} ranks: all-reduce of {SMALL_BYTES} bytes {small * 1e6:,.0f} us, of "
        f"{LARGE_BYTES >> 20} MiB {large * 1e3:,.1f} ms ({LARGE_BYTES / large / 1e9:.2f} GB/s)"
    )


def _seconds(ranks: Ranks, size: int) -> float:
    """Median time of an all-reduce of `size` bytes. Collective.

    Raises:
        InputError: its sum is wrong.
    """
    tensor = torch.empty(size // 4, device=ranks.device)
    taken = []
    for _ in range(ROUNDS + 2):
        tensor.fill_(1.0)
        dist.barrier()
        begin = time.perf_counter()
        dist.all_reduce(tensor)
        total = float(tensor[-1])  # waits for the device
        taken.append(time.perf_counter() - begin)
        if total != ranks.world_size:
            raise InputError(f"an all-reduce over {ranks.world_size} ranks gave {total}, expected {ranks.world_size}")
    return sorted(taken[2:])[ROUNDS // 2]  # the first two connect the ranks
