"""The weights of a model, sharded or not: a copy in memory, and a folder that any world size can load.

The folder has `dense.pt` (the replicated part) and, for each table, a folder of `.npy` files, one per shard. The name
of a file is the rectangle that it covers, so that a rank reads only the rows that it needs. No pickles are loaded:
`dense.pt` uses weights_only=True, arrays allow_pickle=False. (torch.distributed.checkpoint could reshard too, but
loading its `.metadata` file executes a pickle.)
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from recpress.data.errors import InputError
from recpress.modules.fingerprints import is_fingerprint
from recpress.modules.frozen.kernel import QUANTIZED, HasFrozenTables
from recpress.modules.row_source import local_shards
from recpress.trainer.distributed.heartbeat import barrier

DENSE = "dense.pt"
Rectangle = tuple[tuple[int, int], tuple[int, int]]
"""(row range, column range), end-exclusive."""


@dataclass
class Snapshot:
    """A copy in host memory of the weights that training changes, without frozen tables."""

    dense: dict[str, torch.Tensor]
    shards: dict[str, list[torch.Tensor]]

    @staticmethod
    @torch.no_grad()
    def take(model: nn.Module, before: Snapshot | None = None) -> Snapshot:
        """Copy the weights of the model, into the memory of `before` if given."""
        if before is not None:
            for name, tensor in dense_part(model):
                before.dense[name].copy_(tensor)
            for name, parts in trainable_shards(model):
                for (_, part), kept in zip(parts, before.shards[name], strict=True):
                    kept.copy_(part)
            return before
        return Snapshot(
            {name: _on_host(tensor) for name, tensor in dense_part(model)},
            {name: [_on_host(part) for _, part in parts] for name, parts in trainable_shards(model)},
        )

    @torch.no_grad()
    def restore(self, model: nn.Module) -> None:
        for name, tensor in dense_part(model):
            tensor.copy_(self.dense[name])
        for name, parts in trainable_shards(model):
            for (_, part), kept in zip(parts, self.shards[name], strict=True):
                part.copy_(kept)


def _on_host(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(tensor, device="cpu").copy_(tensor)


def save_weights(model: nn.Module, folder: str | Path) -> None:
    """Write all weights to `folder`, which must exist and which all ranks must see. Collective."""
    folder = Path(folder)
    if dist.get_rank() == 0:
        torch.save({name: tensor.detach().cpu() for name, tensor in dense_part(model)}, folder / DENSE)
    for name, parts in [*trainable_shards(model), *((name, parts) for name, _, _, parts in _frozen(model))]:
        place = folder / "tables" / name
        place.mkdir(parents=True, exist_ok=True)
        for rectangle, part in parts:
            if part.numel():
                np.save(place / _file_name(rectangle), part.detach().cpu().numpy(), allow_pickle=False)
    barrier()


@torch.no_grad()
def load_weights(model: nn.Module, folder: str | Path) -> None:
    """Fill `model` from the folder of `save_weights`, with any world size. Every rank reads its own rectangles.

    Raises:
        InputError: a file or table is missing, corrupt, or of another shape or type than in the model.
    """
    folder = Path(folder)
    path, saved = folder / DENSE, load_dense(folder)
    dense = dict(dense_part(model))
    if set(saved) != set(dense):
        odd = sorted(set(saved) ^ set(dense))
        raise InputError(f"{path}: tensor {odd[0]!r} is not in both the file and the model; another configuration?")
    for name, tensor in dense.items():
        if tensor.shape != saved[name].shape:
            raise InputError(f"{path}: {name!r} has shape {tuple(saved[name].shape)}, expected {tuple(tensor.shape)}")
        tensor.copy_(saved[name])
    for name, parts in trainable_shards(model):
        _fill_all(parts, folder / "tables" / name)
    for name, module, table, parts in _frozen(model):
        _fill_all(parts, folder / "tables" / name)
        module.write(table, [part for _, part in parts])


def load_dense(folder: Path) -> dict[str, torch.Tensor]:
    """The replicated part in a folder of `save_weights`. Raises InputError if it cannot be read."""
    path = folder / DENSE
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise InputError(f"{path}: not the weights of a model ({type(error).__name__}: {error})") from error


def _fill_all(parts: Iterable[tuple[Rectangle, torch.Tensor]], place: Path) -> None:
    files = shard_files(place)
    for rectangle, part in parts:
        _fill(part, rectangle, files, place)


def _fill(part: torch.Tensor, want: Rectangle, files: list[tuple[Rectangle, Path]], place: Path) -> None:
    filled = 0
    for have, path in files:
        rows, columns = (_overlap(a, b) for a, b in zip(want, have, strict=True))
        if rows[0] >= rows[1] or columns[0] >= columns[1]:
            continue
        array = open_shard(path, have)
        if torch.from_numpy(np.empty(0, array.dtype)).dtype != part.dtype:
            raise InputError(f"{path}: holds {array.dtype}, expected {part.dtype}")
        (row, _), (column, _) = have
        block = np.array(array[rows[0] - row : rows[1] - row, columns[0] - column : columns[1] - column])
        (row, _), (column, _) = want
        part[rows[0] - row : rows[1] - row, columns[0] - column : columns[1] - column] = torch.from_numpy(block)
        filled += block.size
    if filled != part.numel():
        raise InputError(f"{place}: holds {filled} of the {part.numel()} values of {want}")


def open_shard(path: Path, rectangle: Rectangle) -> np.ndarray:
    """The shard in a file, memory-mapped. Raises InputError if it is damaged or does not have the rectangle's shape."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise InputError(f"{path}: not a shard of a table ({error})") from error
    shape = tuple(stop - start for start, stop in rectangle)
    if array.shape != shape:
        raise InputError(f"{path}: holds {array.dtype} {array.shape}, expected {shape}")
    return array


def _overlap(a: tuple[int, int], b: tuple[int, int]) -> tuple[int, int]:
    return max(a[0], b[0]), min(a[1], b[1])


def _file_name(rectangle: Rectangle) -> str:
    (r0, r1), (c0, c1) = rectangle
    return f"rows-{r0}-{r1}-columns-{c0}-{c1}.npy"


def shard_files(folder: Path) -> list[tuple[Rectangle, Path]]:
    """The shards of a table that `save_weights` wrote, by the rectangle that each covers."""
    found = []
    for path in sorted(folder.glob("*.npy")):
        match = re.fullmatch(r"rows-(\d+)-(\d+)-columns-(\d+)-(\d+)\.npy", path.name)
        if match:
            r0, r1, c0, c1 = map(int, match.groups())
            found.append((((r0, r1), (c0, c1)), path))
    if not found:
        raise InputError(f"{folder}: no shard of this table; was the model saved with another configuration?")
    return found


def is_table(name: str) -> bool:
    """Whether a key of a `state_dict` is an embedding table."""
    return ".embedding_bags." in f".{name}"


def _is_table(name: str, value: Any) -> bool:
    return hasattr(value, "local_shards") or is_table(name)


def dense_part(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Name -> each replicated parameter and buffer."""
    for name, value in model.state_dict().items():
        if not _is_table(name, value) and not is_fingerprint(name):  # the manifest has the factors and id maps
            yield name, value


def trainable_shards(model: nn.Module) -> Iterator[tuple[str, list[tuple[Rectangle, torch.Tensor]]]]:
    """(name, its shards on this rank) of each trainable table."""
    for name, value in model.state_dict().items():
        if _is_table(name, value):
            yield name, local_shards(value)


def _frozen(model: nn.Module) -> Iterator[tuple[str, HasFrozenTables, str, list[tuple[Rectangle, torch.Tensor]]]]:
    """(name, collection, its table, parts as a CPU stores them)."""
    for path, module in model.named_modules():
        if isinstance(module, HasFrozenTables):
            short = ".".join(p for p in path.split(".") if p not in ("_dmp_wrapped_module", "module"))
            for table in module.tables():
                # quantized rows are never sharded by column; their width is in bytes
                parts = [
                    ((s.rows, (0, t.shape[1]) if table.storage in QUANTIZED else s.columns), t)
                    for s, t in module.shards(table.name)
                ]
                yield f"{short}.{table.name}.frozen", module, table.name, parts
