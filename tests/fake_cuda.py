"""CUDA without a GPU: fake tensors on the device "cuda" have shapes and no numbers.

`FakeTensorMode` raises if an operator gets tensors of different devices, or if the host reads a number or a size that
only the device knows. `without_waiting` also finds copies between host and device for which the host waits.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CUDA = torch.device("cuda", 0)
_CUDA, _META = 1, 14  # of c10::DeviceType
_COPIES = {torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default}


class _NoWaiting(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _COPIES:
            devices = {x.device.type for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
            devices |= {torch.device(kwargs["device"]).type} if kwargs.get("device") is not None else set()
            blocking = not (
                kwargs.get("non_blocking") or (func is torch.ops.aten.copy_.default and args[2:] == (True,))
            )
            if len(devices) > 1 and blocking:
                raise AssertionError(f"{func} between {' and '.join(sorted(devices))}: the host waits for the device")
        return func(*args, **kwargs)


@contextmanager
def fake_cuda() -> Iterator[None]:
    """Within the block all tensors are fake, also those that were made before."""
    with _cuda_guard(), FakeTensorMode(allow_non_fake_inputs=True):
        yield


@contextmanager
def _cuda_guard() -> Iterator[None]:
    """A device guard that does nothing, without which a torch that was built without CUDA refuses to index its tensors.

    That of the device "meta" does nothing. The registry is an array of pointers, one per device type.
    """
    if torch.version.cuda is not None:
        torch._C._ensureCUDADeviceGuardSet()
        yield
        return
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    guards = (ctypes.c_void_p * (_META + 1)).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
    guards[_CUDA] = guards[_META]
    try:
        yield
    finally:
        guards[_CUDA] = None


def without_waiting(step: Callable[[], Any]) -> Any:
    """Run `step` twice: the first call may copy constants to the device, the second must not wait for it."""
    step()
    with _NoWaiting():
        return step()


def cuda_ids(count: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    """(count,) fake numbers on the device."""
    return torch.empty(count, dtype=dtype, device=CUDA)
