"""Named resources of common nodes, for `-h NAME` of a component: whole nodes, less some memory for the system.

The package registers them with TorchX (`torchx.named_resources`), so that every component accepts them. TorchX
itself has AWS's instance types (`aws_p4d.24xlarge`, ...), with their network devices and, on Kubernetes, their node
selector.
"""

from collections.abc import Callable

from torchx.specs import Resource

GIB = 1024
SHARE = 0.95
"""Share of a node's memory for the job: the operating system and the scheduler need the rest."""


def _node(cpu: int, memory_gib: int, gpu: int = 0) -> Resource:
    return Resource(cpu=cpu, gpu=gpu, memMB=int(memory_gib * GIB * SHARE))


def cpu_8() -> Resource:
    """8 cores, 32 GiB."""
    return _node(8, 32)


def cpu_32() -> Resource:
    """32 cores, 128 GiB."""
    return _node(32, 128)


def cpu_96() -> Resource:
    """96 cores, 768 GiB: for factorizations and maps of large logs."""
    return _node(96, 768)


def a10g() -> Resource:
    """One A10G of 24 GB (AWS g5.4xlarge and the like)."""
    return _node(16, 64, gpu=1)


def a10g_x4() -> Resource:
    """Four A10G of 24 GB (AWS g5.12xlarge)."""
    return _node(48, 192, gpu=4)


def a100_x8() -> Resource:
    """Eight A100 of 40 or 80 GB (AWS p4d and p4de, DGX A100)."""
    return _node(96, 1024, gpu=8)


def h100_x8() -> Resource:
    """Eight H100 of 80 GB (AWS p5, DGX H100)."""
    return _node(112, 2048, gpu=8)


def h200_x8() -> Resource:
    """Eight H200 of 141 GB (AWS p5en, DGX H200)."""
    return _node(112, 2048, gpu=8)


RESOURCES: dict[str, Callable[[], Resource]] = {
    node.__name__: node for node in (cpu_8, cpu_32, cpu_96, a10g, a10g_x4, a100_x8, h100_x8, h200_x8)
}
