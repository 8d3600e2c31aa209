"""Collectives on tensors and arrays. Each also works without a process group, as world size 1."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

_CPU = torch.device("cpu")


def rank_and_world() -> tuple[int, int]:
    """Rank and world size of the default process group; (0, 1) without one."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def communication_device(device: torch.device = _CPU) -> torch.device:
    """Where a collective of a tensor on `device` runs: there with NCCL on CUDA, else on the CPU with gloo.

    A group with a backend per device is named "cpu:gloo,cuda:nccl"; one with nccl alone has no collectives on the CPU.
    """
    backend = dist.get_backend() if dist.is_initialized() else ""
    if "nccl" not in backend:
        return _CPU
    if device.type == "cuda":
        return device
    return _CPU if "cpu:" in backend else torch.device("cuda", torch.cuda.current_device())


def all_reduce(tensor: Tensor, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
    """The tensor reduced over the ranks, on its device. May overwrite the argument."""
    if rank_and_world()[1] == 1:
        return tensor
    moved = tensor.to(communication_device(tensor.device)).contiguous()
    dist.all_reduce(moved, op)
    return moved.to(tensor.device)


def all_gather(tensor: Tensor) -> list[Tensor]:
    """The tensors of all ranks, of equal shapes, in order of rank, on the device of the argument."""
    _, world = rank_and_world()
    if world == 1:
        return [tensor]
    moved = tensor.to(communication_device(tensor.device)).contiguous()
    out = [torch.empty_like(moved) for _ in range(world)]
    dist.all_gather(out, moved)
    return [part.to(tensor.device) for part in out]


def all_gather_arrays(arrays: Sequence[np.ndarray]) -> list[list[np.ndarray]]:
    """One-dimensional arrays of all ranks, of any lengths: result[r][j] is array j of rank r."""
    if rank_and_world()[1] == 1:
        return [list(arrays)]
    lengths = torch.stack(all_gather(torch.tensor([len(array) for array in arrays])))  # (world, arrays)
    gathered = []
    for j, array in enumerate(arrays):
        padded = np.zeros(int(lengths[:, j].max()), dtype=array.dtype)
        padded[: len(array)] = array
        parts = all_gather(torch.from_numpy(padded))
        gathered.append([part.numpy()[: int(lengths[r, j])] for r, part in enumerate(parts)])
    return [list(of_rank) for of_rank in zip(*gathered, strict=True)]


def gather_arrays(arrays: Sequence[np.ndarray]) -> list[list[np.ndarray]] | None:
    """As `all_gather_arrays`, on rank 0; None on other ranks."""
    rank, world = rank_and_world()
    if world == 1:
        return [list(arrays)]
    device = communication_device()
    lengths = torch.stack(all_gather(torch.tensor([len(array) for array in arrays])))  # (world, arrays)
    found: list[list[np.ndarray]] = [list(arrays)] + [[] for _ in range(world - 1)]
    for sender in range(1, world):
        for j, array in enumerate(arrays):
            if rank == sender:
                dist.send(torch.from_numpy(np.ascontiguousarray(array)).to(device), 0)
            elif rank == 0:
                received = torch.from_numpy(np.empty(int(lengths[sender, j]), array.dtype)).to(device)
                dist.recv(received, sender)
                found[sender].append(received.cpu().numpy())
    return found if rank == 0 else None


def exchange(arrays: Sequence[np.ndarray], owner: np.ndarray) -> list[np.ndarray]:
    """Send row k of each array to rank owner[k]; return the received rows, by sending rank, then by its row."""
    _, world = rank_and_world()
    if world == 1:
        return list(arrays)
    order = np.argsort(owner, kind="stable")
    device = communication_device()
    sent = torch.from_numpy(np.bincount(owner, minlength=world)).to(device)
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent)
    out_splits, in_splits = received.tolist(), sent.tolist()
    result = []
    for array in arrays:
        rows = torch.from_numpy(array[order]).to(device)
        arrived = rows.new_empty(sum(out_splits))
        dist.all_to_all_single(arrived, rows, out_splits, in_splits)
        result.append(arrived.cpu().numpy())
    return result
