"""torch.distributed.checkpoint (DCP) with plain files: the bytes of the tensors, and their offsets as JSON.

DCP plans which rank writes which part of a state, and loads it on any number of ranks. Its own files are pickles: they
cost a copy and a slow checksum to write, and loading `.metadata` would execute code. Here `tensors-0.bin` of rank 0
has the bytes of the tensors as in memory (little-endian), and `tensors.json` has their names, shapes and offsets.
States are flat: name -> tensor or ShardedTensor.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from recpress.trainer.checkpoint import file_bytes
from recpress.trainer.checkpoint.staged import Part, Staged, State

TENSORS = "tensors.json"
_NUMPY = ("float64", "float32", "float16", "int64", "int32", "int16", "int8", "uint8", "bool")
_BLOCK = 4 << 20  # bytes that are read at a time
_ALIGN = 64  # alignment of a part in a file, in bytes: any dtype, a cache line


@dataclass(frozen=True)
class Layout:
    """Which bytes of a state a rank writes. It depends on names and shapes alone."""

    file: str
    """Of this rank."""
    ranges: dict[Part, tuple[int, int]]
    """Part -> (offset in the file, length), in bytes, of the parts that this rank writes; in the order of the file."""
    content: dict[str, Any] | None
    """Of `tensors.json`, on rank 0."""


def lay_out(state: State, group: dist.ProcessGroup | None) -> Layout:
    """The layout of the files of a state, by DCP's plan. Collective over `group`.

    It takes about 20 ms of Python for a two-tower network, so compute it once per run.
    """
    planned = _Planned(f"tensors-{dist.get_rank(group)}.bin")
    planner = dcp.DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    dcp.save(dict(state), storage_writer=planned, planner=planner, process_group=group, no_dist=False)
    return Layout(planned.file, planned.ranges, planned.content)


def write(layout: Layout, staged: Staged, folder: Path) -> dict[str, dict[str, Any]]:
    """Write the staged bytes of this rank and, on rank 0, `tensors.json`. Return the files' entries of a manifest.

    Raises:
        OSError: with the name of the file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written = {}
    if staged.size:
        written[layout.file] = file_bytes.write(folder / layout.file, staged.content, staged.checksum, staged.summed)
    if layout.content is not None:
        (folder / TENSORS).write_text(json.dumps(layout.content), encoding="utf-8")
        written[TENSORS] = file_bytes.describe(folder / TENSORS)
    return written


def load(state: State, folder: Path, group: dist.ProcessGroup | None) -> None:
    """Fill the tensors of `state`, each rank its own parts, from files of any number of ranks. Collective.

    Raises:
        CheckpointException: a name is missing, a shape differs, a file cannot be read. On every rank.
    """
    dcp.load(dict(state), storage_reader=_Reader(folder), process_group=group, no_dist=False)


def names(folder: Path) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the tensors in `folder`.

    Raises:
        ValueError, OSError: `tensors.json` is missing or damaged.
    """
    return {name: tuple(entry["size"]) for name, entry in _read(folder).items()}


def open_tensors(folder: Path) -> dict[str, list[tuple[tuple[int, ...], np.ndarray]]]:
    """Name -> (offsets, memory map) of each part of a tensor. Reads nothing of the tensors.

    Raises:
        ValueError, OSError, KeyError, TypeError: a file is missing or damaged.
    """
    found: dict[str, list[tuple[tuple[int, ...], np.ndarray]]] = {}
    for name, entry in _read(folder).items():
        if entry["dtype"] not in _NUMPY:  # numpy has no bfloat16
            continue
        found[name] = [
            (
                tuple(chunk["offsets"]),
                np.memmap(folder / chunk["file"], entry["dtype"], "r", chunk["at"], tuple(chunk["sizes"])),
            )
            for chunk in entry["chunks"]
        ]
    return found


@dataclass(frozen=True)
class _Location:
    """Location of the bytes of a part."""

    file: str
    at: int
    length: int
    """In bytes."""
    sizes: tuple[int, ...] = ()
    """Shape of the part."""
    dtype: torch.dtype = torch.uint8


class _Planned(dcp.StorageWriter):
    """Writes nothing; keeps DCP's plan."""

    def __init__(self, file: str) -> None:
        self.file = file
        self.ranges: dict[Part, tuple[int, int]] = {}
        self.content: dict[str, Any] | None = None  # of the coordinator

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        pass  # one writer, one plan

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    def prepare_local_plan(self, plan: dcp.SavePlan) -> dcp.SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[dcp.SavePlan]) -> list[dcp.SavePlan]:
        return plans

    def write_data(self, plan: dcp.SavePlan, planner: dcp.SavePlanner) -> Future[list[WriteResult]]:
        end, results = 0, []
        for item in plan.items:
            tensor = planner.resolve_data(item)
            assert isinstance(tensor, torch.Tensor), f"{item.index.fqn} is no tensor"
            self.ranges[item.index.fqn, tuple(item.index.offset or ())] = (end, tensor.nbytes)
            results.append(WriteResult(item.index, tensor.nbytes, _Location(self.file, end, tensor.nbytes)))
            end += -(-tensor.nbytes // _ALIGN) * _ALIGN
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Collect the locations of all parts. Called on the coordinator, with the plans of all ranks."""
        ranges = {
            result.index: result.storage_data for of_rank in results for result in of_rank if result.size_in_bytes
        }  # an empty part may have the offset of another
        self.content = {}
        for name, entry in metadata.state_dict_metadata.items():
            assert isinstance(entry, TensorStorageMetadata), f"{name} is no tensor"
            chunks = []
            for chunk in entry.chunks:
                if not chunk.sizes.numel():
                    continue
                where = ranges[MetadataIndex(name, chunk.offsets)]
                chunks.append(
                    {
                        "offsets": list(chunk.offsets),
                        "sizes": list(chunk.sizes),
                        "file": where.file,
                        "at": where.at,
                        "length": where.length,
                    }
                )
            dtype = str(entry.properties.dtype).removeprefix("torch.")
            self.content[name] = {"dtype": dtype, "size": list(entry.size), "chunks": chunks}

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return True


class _Reader(dcp.StorageReader):
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ranges: dict[MetadataIndex, _Location] = {}

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        pass  # one reader, one checkpoint

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        tensors: dict[str, Any] = {}
        for name, entry in _read(self.folder).items():
            chunks = []
            dtype = getattr(torch, entry["dtype"], None)
            if not isinstance(dtype, torch.dtype):
                raise ValueError(f"{self.folder / TENSORS}: tensor '{name}': no such type {entry['dtype']!r}")
            for chunk in entry["chunks"]:
                offsets, sizes = torch.Size(chunk["offsets"]), torch.Size(chunk["sizes"])
                chunks.append(ChunkStorageMetadata(offsets=offsets, sizes=sizes))
                where = _Location(chunk["file"], chunk["at"], chunk["length"], tuple(sizes), dtype)
                self.ranges[MetadataIndex(name, offsets)] = where
            tensors[name] = TensorStorageMetadata(TensorProperties(dtype=dtype), torch.Size(entry["size"]), chunks)
        return Metadata(tensors)

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    def prepare_local_plan(self, plan: dcp.LoadPlan) -> dcp.LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[dcp.LoadPlan]) -> list[dcp.LoadPlan]:
        return plans

    def read_data(self, plan: dcp.LoadPlan, planner: dcp.LoadPlanner) -> Future[None]:
        for item in plan.items:
            target = planner.resolve_tensor(item).detach()
            _fill(target, self.folder, self.ranges[item.storage_index], item.storage_offsets)
            planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return True


def _fill(target: torch.Tensor, folder: Path, part: _Location, offsets: tuple[int, ...]) -> None:
    """Fill `target` with the slice of `part` at `offsets`, a few rows at a time."""
    if target.dim() == 0:
        target, part, offsets = target[None], replace(part, sizes=(1,)), (0,)
    row = part.length // part.sizes[0]
    step = max(1, _BLOCK // row)
    block = torch.empty(min(step, len(target)) * row, dtype=torch.uint8)
    with open(folder / part.file, "rb", buffering=0) as file:
        file.seek(part.at + offsets[0] * row)
        for rows in target.split(step):
            wanted = block[: len(rows) * row]
            _read_into(wanted.numpy().data, file)
            found = wanted.view(part.dtype).view(len(rows), *part.sizes[1:])
            for dim in range(1, rows.dim()):
                found = found.narrow(dim, offsets[dim], rows.shape[dim])
            rows.copy_(found)


def _read_into(buffer: memoryview, file: Any) -> None:
    while buffer:
        count = file.readinto(buffer)
        if not count:
            raise ValueError(f"{file.name}: ends too early")
        buffer = buffer[count:]


def _read(folder: Path) -> dict[str, Any]:
    content = json.loads((folder / TENSORS).read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError(f"{folder / TENSORS}: expected names of tensors")
    return content
