"""TorchX components: a stage of recpress on one or many nodes.

    torchx run -s local_cwd launch/components.py:train -j 1x2 -- --data LOG --out OUT

The arguments after `--` are those of `recpress train`; `recpress train --help` lists them.
"""

import torchx
from torchx import specs
from torchx.components import dist

# Restarted workers otherwise read stale addresses from the agent's store (pytorch issue 135712).
_ENV = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}


def _stage(
    stage: str, args: tuple[str, ...], j: str, cpu: int, gpu: int, mem_mb: int, h: str, image: str
) -> specs.AppDef:
    return dist.ddp(
        *stage.split(),
        *args,
        m="recpress.trainer.cli",
        name=f"recpress/{stage.replace(' ', '-')}",
        image=image,
        j=j,
        cpu=cpu,
        gpu=gpu,
        memMB=mem_mb,
        h=h or None,
        env=dict(_ENV),
    )


def factorize(
    *args: str,
    j: str = "1x1",
    cpu: int = 2,
    gpu: int = 0,
    mem_mb: int = 8192,
    h: str = "",
    image: str = torchx.IMAGE,
) -> specs.AppDef:
    """Factorize a log: `recpress factorize` on every process.

    Args:
        args: arguments of `recpress factorize`
        j: {nodes}x{processes on each}
        cpu: CPU cores of a node
        gpu: GPUs of a node
        mem_mb: memory of a node, MB
        h: named resource, instead of cpu, gpu and mem_mb
        image: container image, where the scheduler runs containers
    """
    return _stage("factorize", args, j, cpu, gpu, mem_mb, h, image)


def train(
    *args: str,
    j: str = "1x1",
    cpu: int = 2,
    gpu: int = 0,
    mem_mb: int = 8192,
    h: str = "",
    image: str = torchx.IMAGE,
) -> specs.AppDef:
    """Train the two-tower network: `recpress train` on every process.

    Args:
        args: arguments of `recpress train`
        j: {nodes}x{processes on each}
        cpu: CPU cores of a node
        gpu: GPUs of a node
        mem_mb: memory of a node, MB
        h: named resource, instead of cpu, gpu and mem_mb
        image: container image, where the scheduler runs containers
    """
    return _stage("train", args, j, cpu, gpu, mem_mb, h, image)


def hash(
    *args: str,
    j: str = "1x1",
    cpu: int = 2,
    gpu: int = 0,
    mem_mb: int = 8192,
    h: str = "",
    image: str = torchx.IMAGE,
) -> specs.AppDef:
    """Make maps of ids to rows: `recpress hash`; the first process works.

    Args:
        args: arguments of `recpress hash`
        j: {nodes}x{processes on each}
        cpu: CPU cores of a node
        gpu: GPUs of a node
        mem_mb: memory of a node, MB
        h: named resource, instead of cpu, gpu and mem_mb
        image: container image, where the scheduler runs containers
    """
    return _stage("hash", args, j, cpu, gpu, mem_mb, h, image)


def evaluate(
    *args: str,
    j: str = "1x1",
    cpu: int = 2,
    gpu: int = 0,
    mem_mb: int = 8192,
    h: str = "",
    image: str = torchx.IMAGE,
) -> specs.AppDef:
    """Rank held-out rows: `recpress evaluate` on every process.

    Args:
        args: arguments of `recpress evaluate`
        j: {nodes}x{processes on each}
        cpu: CPU cores of a node
        gpu: GPUs of a node
        mem_mb: memory of a node, MB
        h: named resource, instead of cpu, gpu and mem_mb
        image: container image, where the scheduler runs containers
    """
    return _stage("evaluate", args, j, cpu, gpu, mem_mb, h, image)
