"""torch.distributed.checkpoint (DCP) on plain files: tensors as DCP writes them, its metadata as JSON.

DCP cuts a state into one part a rank and puts it together again on any number of ranks. Its own `.metadata` file is a
pickle, which loading would execute; here the same facts are in `tensors.json`, and a file of tensors is read with
weights_only=True. States are flat: name -> tensor or ShardedTensor.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import checkpoint as dcp
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

TENSORS = "tensors.json"
State = dict[str, Any]
"""Name -> tensor (replicated, or of one rank alone) or ShardedTensor."""


class Staged:
    """A copy of the state in host memory, whose buffers serve for one copy after the other."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, tuple[int, ...]], torch.Tensor] = {}

    @torch.no_grad()
    def copy(self, state: State) -> None:
        """Copy what this rank holds of the state."""
        wanted = {(name, place): tensor for name, value in state.items() for place, tensor in _parts(value)}
        for key in self._buffers.keys() - wanted.keys():
            del self._buffers[key]
        for key, tensor in wanted.items():
            buffer = self._buffers.get(key)
            if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
                self._buffers[key] = tensor.detach().to("cpu", copy=True)
            else:
                buffer.copy_(tensor)

    @property
    def nbytes(self) -> int:
        return sum(buffer.nbytes for buffer in self._buffers.values())

    def find(self, name: str, place: tuple[int, ...]) -> torch.Tensor:
        """The copy of the part of `name` that begins at `place`."""
        return self._buffers[name, place]


def save(state: State, staged: Staged, folder: Path, group: dist.ProcessGroup | None) -> None:
    """Write the copy `staged` of `state` into `folder`, which all ranks see; only names and shapes are read of `state`.

    Collective over `group`.

    Raises:
        CheckpointException: a rank could not write. On every rank.
    """
    dcp.save(
        dict(state), storage_writer=_Writer(folder), planner=_StagedPlanner(staged), process_group=group, no_dist=False
    )


def load(state: State, folder: Path, group: dist.ProcessGroup | None) -> None:
    """Fill the tensors of `state`, each rank its own parts, from what any number of ranks saved. Collective.

    Raises:
        CheckpointException: a name is missing, a shape differs, a file cannot be read. On every rank.
    """
    dcp.load(dict(state), storage_reader=_Reader(folder), process_group=group, no_dist=False)


def names(folder: Path) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the tensors that were saved in `folder`.

    Raises:
        ValueError, OSError: `tensors.json` is missing or damaged.
    """
    return {name: tuple(entry["size"]) for name, entry in _read(folder).items()}


def _parts(value: torch.Tensor | ShardedTensor) -> list[tuple[tuple[int, ...], torch.Tensor]]:
    if isinstance(value, ShardedTensor):
        return [(tuple(shard.metadata.shard_offsets), shard.tensor) for shard in value.local_shards()]
    return [((0,) * value.dim(), value)]


class _StagedPlanner(dcp.DefaultSavePlanner):
    """Plans by the state and takes the values from its copy, so that training can go on meanwhile."""

    def __init__(self, staged: Staged) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._staged = staged

    def lookup_object(self, index: MetadataIndex) -> Any:
        return self._staged.find(index.fqn, tuple(index.offset or ()))


class _Writer(dcp.FileSystemWriter):
    def __init__(self, folder: Path) -> None:
        super().__init__(folder, single_file_per_rank=True, sync_files=True)

    def finish(self, metadata: Metadata, results: list[list[Any]]) -> None:
        """Write what there is and where it lies; called on the coordinator, after all ranks have written."""
        places = {result.index: result.storage_data for results_of_rank in results for result in results_of_rank}
        content: dict[str, Any] = {}
        for name, entry in metadata.state_dict_metadata.items():
            assert isinstance(entry, TensorStorageMetadata), f"{name} is no tensor"
            chunks = []
            for chunk in entry.chunks:
                place = places[MetadataIndex(name, chunk.offsets)]
                chunks.append(
                    {
                        "offsets": list(chunk.offsets),
                        "sizes": list(chunk.sizes),
                        "file": place.relative_path,
                        "at": place.offset,
                        "length": place.length,
                    }
                )
            dtype = str(entry.properties.dtype).removeprefix("torch.")
            content[name] = {"dtype": dtype, "size": list(entry.size), "chunks": chunks}
        (Path(self.path) / TENSORS).write_text(json.dumps(content), encoding="utf-8")


class _Reader(dcp.FileSystemReader):
    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        tensors: dict[str, Any] = {}
        places = {}
        for name, entry in _read(Path(self.path)).items():
            chunks = []
            for chunk in entry["chunks"]:
                offsets = torch.Size(chunk["offsets"])
                chunks.append(ChunkStorageMetadata(offsets=offsets, sizes=torch.Size(chunk["sizes"])))
                places[MetadataIndex(name, offsets)] = _StorageInfo(chunk["file"], chunk["at"], chunk["length"])
            dtype = getattr(torch, entry["dtype"])
            tensors[name] = TensorStorageMetadata(TensorProperties(dtype=dtype), torch.Size(entry["size"]), chunks)
        return Metadata(tensors, storage_data=places, storage_meta=StorageMeta(load_id=self.load_id))


def _read(folder: Path) -> dict[str, Any]:
    content = json.loads((folder / TENSORS).read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError(f"{folder / TENSORS}: expected names of tensors")
    return content
