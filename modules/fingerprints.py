"""Fingerprints of id maps and frozen rows, which a checkpoint does not contain: saved with it, and checked on loading.

A `Fingerprinted` module adds one small tensor per map or table to its `state_dict`, named `fingerprint.<name>`.
`load_state_dict` compares it. torch.distributed.checkpoint writes into it in place, and the next forward compares it. A
checkpoint without fingerprints loads without a check.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import nn

from recpress.modules.row_source import RowSource

PREFIX = "fingerprint."
_SKETCH, _READ = 1024, 4
"""Numbers in a sketch of frozen rows, and rows to read for each number."""
_TOLERANCE = 1e-4


def is_fingerprint(name: str) -> bool:
    """Whether a key of a `state_dict` is a fingerprint."""
    return f".{PREFIX}" in f".{name}"


def rows_fingerprint(source: RowSource) -> torch.Tensor:
    """(min(rows, 1024),) float64: weighted sums of rows spread evenly over the source. Reads all of up to 4,096 rows.

    It is not a digest, because rows may come from a solver whose last bits differ between machines. It is the same on
    every rank, independent of sharding.
    """
    rows, dim = source.shape
    count = empty_rows_fingerprint(rows).numel()
    across = torch.sin(torch.arange(1, dim + 1, dtype=torch.float64) * 12.9898)
    along = torch.sin(torch.arange(1, _READ + 1, dtype=torch.float64) * 78.233)

    def read(first: int, last: int) -> torch.Tensor:
        block: Any = source[first:last]
        block = block.detach().cpu() if isinstance(block, torch.Tensor) else torch.from_numpy(np.array(block))
        return block.double() @ across

    whole = read(0, rows) if rows <= _SKETCH * _READ else None
    found = torch.empty(count, dtype=torch.float64)
    for k in range(count):
        first, last = k * rows // count, (k + 1) * rows // count
        last = min(last, first + _READ)
        values = read(first, last) if whole is None else whole[first:last]
        found[k] = values @ along[: last - first]
    return found


def empty_rows_fingerprint(rows: int) -> torch.Tensor:
    """The fingerprint of a table that is not loaded: all NaN. It is never compared."""
    return torch.full((min(rows, _SKETCH),), torch.nan, dtype=torch.float64)


class Fingerprinted(nn.Module):
    """A module whose `state_dict` identifies the maps or rows that it was saved with.

    `_own` are the fingerprints of this module. `_shown` are the tensors in `state_dict`, into which a checkpoint may be
    loaded in place.
    """

    def init_fingerprints(self, own: dict[str, torch.Tensor]) -> None:
        """own: name -> fingerprint."""
        self._own = own
        self._shown = {name: value.clone() for name, value in own.items()}
        self._versions = {name: value._version for name, value in self._shown.items()}

    def describe_mismatch(self, name: str) -> str:
        """The error message for a checkpoint with another fingerprint."""
        raise NotImplementedError

    def set_fingerprint(self, name: str, value: torch.Tensor) -> None:
        """Set the fingerprint of what was loaded.

        Raises:
            ValueError: nothing was loaded before, and a checkpoint was saved with something else.
        """
        if _is_known(self._shown[name]) and not _is_known(self._own[name]):
            self._compare(name, self._shown[name], value)
        self._own[name] = value
        self._shown[name].copy_(value)
        self._versions[name] = self._shown[name]._version

    def check_fingerprints(self) -> None:
        """Raise ValueError if a checkpoint of another map or table was loaded into the tensors of `state_dict`."""
        for name, shown in self._shown.items():
            if shown._version != self._versions[name]:
                self._compare(name, shown, self._own[name])
                self._versions[name] = shown._version

    def _compare(self, name: str, saved: torch.Tensor, own: torch.Tensor) -> None:
        if not (_is_known(saved) and _is_known(own)):
            return
        saved = saved.detach().cpu()
        same = saved.shape == own.shape
        if same and own.is_floating_point():
            scale = torch.maximum(own.abs(), saved.abs()).square().mean().sqrt()
            same = bool(((saved - own).abs() <= _TOLERANCE * scale).all())
        elif same:
            same = torch.equal(saved, own)
        if not same:
            raise ValueError(self.describe_mismatch(name))

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, shown in self._shown.items():
            destination[prefix + PREFIX + name] = shown.detach()  # shares the version counter

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        unexpected: list[str] = []
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, unexpected, error_msgs)
        known = {prefix + PREFIX + name: name for name in self._shown}
        unexpected_keys += [key for key in unexpected if key not in known]
        for key, name in known.items():
            saved = state_dict.get(key)
            if saved is None or not _is_known(saved):
                continue
            # Raise immediately, because DistributedModelParallel drops what is added to error_msgs.
            self._compare(name, saved, self._own[name])
            if not _is_known(self._own[name]):  # compare when rows are loaded
                self._shown[name] = saved.detach().cpu().clone()
                self._versions[name] = self._shown[name]._version


def _is_known(value: torch.Tensor) -> bool:
    return not value.is_floating_point() or not bool(torch.isnan(value).any())


def unique_names(names: Iterable[str], what: str) -> None:
    """Raise ValueError if a name is repeated."""
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise ValueError(f"{what}: the name {name!r} is repeated, expected distinct names")
        seen.add(name)
