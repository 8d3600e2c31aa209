"""CUDA without a GPU: fake tensors on the device "cuda" have shapes and no numbers.

`FakeTensorMode` raises if an operator gets tensors of different devices, or if the host reads a number or a size that
only the device knows. `without_waiting` also finds copies between host and device for which the host waits.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fbgemm_gpu  # noqa: F401  (registers torch.ops.fbgemm)
import pytest
import torch
import torch.distributed as dist
from fbgemm_gpu.split_table_batched_embeddings_ops_training import SplitTableBatchedEmbeddingBagsCodegen
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torchrec.distributed import embeddingbag
from torchrec.distributed.model_parallel import DefaultDataParallelWrapper
from torchrec.distributed.types import ShardingEnv

from recpress.modules.frozen.kernel import HasFrozenTables
from recpress.modules.hashing.learned_hash import LearnedHash

CUDA = torch.device("cuda", 0)
_CUDA, _META = 1, 14  # of c10::DeviceType
_COPIES = {torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default}


def _ours() -> bool:
    """Whether recpress makes this call, and not TorchRec, whose exchange copies small constants in each step."""
    frame = sys._getframe(2)
    while frame is not None:
        name = str(frame.f_globals.get("__name__", ""))
        if name.startswith(("torchrec.", "fbgemm_gpu.")):
            return False
        if name.startswith("recpress."):
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return True


class _NoWaiting(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _COPIES:
            devices = {x.device.type for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
            devices |= {torch.device(kwargs["device"]).type} if kwargs.get("device") is not None else set()
            blocking = not (
                kwargs.get("non_blocking") or (func is torch.ops.aten.copy_.default and args[2:] == (True,))
            )
            if len(devices) > 1 and blocking and _ours():
                raise AssertionError(f"{func} between {' and '.join(sorted(devices))}: the host waits for the device")
        return func(*args, **kwargs)


class _Mode(FakeTensorMode):
    def __deepcopy__(self, memo: Any) -> _Mode:
        """A copy of a fake tensor has the same mode. Two modes would free the weak references to storages twice."""
        return self


@contextmanager
def fake_cuda() -> Iterator[None]:
    """Within the block all tensors are fake, also those that were made before."""
    register_kernels()
    with _cuda_guard(), _Mode(allow_non_fake_inputs=True):
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


def backward(loss: torch.Tensor, model: nn.Module) -> None:
    """`loss.backward()`. In a build without CUDA, where autograd's engine refuses the device, gradients of zero.

    There, tests on the device "meta", which raises alike when a number is read, cover the backward pass.
    """
    if torch.version.cuda is not None:
        loss.backward()
        return
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)


def without_waiting(step: Callable[[], Any]) -> Any:
    """Run `step` twice: the first call may copy constants to the device, the second must not wait for it."""
    step()
    with _NoWaiting():
        return step()


def cuda_ids(count: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    """(count,) fake numbers on the device."""
    return torch.empty(count, dtype=dtype, device=CUDA)


@contextmanager
def fake_rank() -> Iterator[None]:
    """`fake_cuda` on the only rank of a process group that exchanges nothing, for DistributedModelParallel.

    Parameters of the dense part are made on the device. DistributedDataParallel, which is torch's own and knows no fake
    tensors, does not wrap them.
    """
    variables = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    from_group, make_tables = ShardingEnv.from_process_group, SplitTableBatchedEmbeddingBagsCodegen.__init__

    def outside(*args: Any, **kwargs: Any) -> ShardingEnv:
        with unset_fake_temporarily():
            return from_group(*args, **kwargs)

    def made(tables: Any, *args: Any, **kwargs: Any) -> None:
        make_tables(tables, *args, **kwargs)
        tables.iter_cpu = _Steps()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SplitTableBatchedEmbeddingBagsCodegen, "__init__", made)
        for name, value in variables.items():
            patch.setenv(name, value)
        patch.setattr(ShardingEnv, "from_process_group", outside)
        patch.setattr(DefaultDataParallelWrapper, "wrap", lambda *_: None)
        patch.setattr(embeddingbag, "validate_keyed_jagged_tensor", lambda *_: True)  # TorchRec reads the first batch
        patch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=80 << 30))
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
        try:
            with fake_cuda(), CUDA:
                yield
        finally:
            dist.destroy_process_group()


class _Steps:
    """In place of a tensor on the host in which fbgemm counts steps: it reads its number."""

    def cpu(self) -> _Steps:
        return self

    def item(self) -> int:
        return 1

    def add_(self, more: int) -> _Steps:
        return self


def ready(model: nn.Module) -> nn.Module:
    """Frozen tables as if rows had been loaded, maps on the device."""
    for module in model.modules():
        if isinstance(module, LearnedHash):
            module.to(CUDA)
        elif isinstance(module, HasFrozenTables):
            module._loaded = {table.name for table in module.tables()}
    return model


def register_kernels() -> None:
    """Shapes of the results of fbgemm's operators, where the CPU build of fbgemm registers none."""
    name = "fbgemm::split_embedding_codegen_forward_{}_pt2_wrapper"
    for kind in ("weighted", "unweighted"):
        _register(name.format(kind), _pooled)
    for kind in ("weighted", "unweighted"):
        _register(f"fbgemm::split_embedding_backward_codegen_rowwise_adagrad_{kind}_pt2_wrapper", _backward)
    _register("fbgemm::int_nbit_split_embedding_codegen_lookup_function", _nbit)


def _register(name: str, fake: Callable[..., Any]) -> None:
    if not torch._C._dispatch_has_kernel_for_dispatch_key(name, "Meta"):
        torch.library.register_fake(name, fake)


def _pooled(*args: Any) -> torch.Tensor:
    d_offsets, total, indices, offsets = args[6], args[7], args[10], args[11]
    return indices.new_empty((len(offsets) - 1) // (len(d_offsets) - 1), total, dtype=torch.float32)


def _backward(grad: torch.Tensor, *args: Any) -> torch.Tensor:
    return grad.new_empty(args[14].shape)  # of the weights of the ids


def _nbit(*args: Any, **kwargs: Any) -> torch.Tensor:
    d_offsets, total, indices, offsets = args[5], args[6], args[12], args[13]
    return indices.new_empty((len(offsets) - 1) // (len(d_offsets) - 1), total, dtype=torch.float32)
