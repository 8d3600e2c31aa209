"""TorchX components: a stage of recpress on every process of one or many nodes.

    torchx run -s local_cwd launch/components.py:train -j 1x2 -- --data LOG --out OUT

With recpress installed, `recpress.train` is the same as `launch/components.py:train`. The arguments after `--` are
those of `recpress train`, and are checked before anything is submitted. docs/launch/cluster.md is the guide.

TorchX reads signatures and docstrings from the source of each function, so the common options stand in all of them.
"""

from typing import List, Optional  # TorchX reads annotations by these names

import torchx
from torchx import specs

from recpress.launch.app import stage_app


def factorize(
    *args: str,
    j: str = "1x1",
    cpu: int = 2,
    gpu: int = 0,
    mem_mb: int = 8192,
    h: Optional[str] = None,
    image: str = torchx.IMAGE,
    env: Optional[str] = None,
    mounts: Optional[List[str]] = None,
    max_restarts: int = 0,
    max_retries: int = 0,
    rdzv_port: int = 29500,
    rdzv_timeout: int = 600,
    grace: int = 60,
) -> specs.AppDef:
    """Factorize a log: `recpress factorize` on every process.

    Args:
        args: arguments of `recpress factorize`
        j: nodes x processes on each, as 2x8; MIN:MAXx8 for a number of nodes that may change
        cpu: CPU cores of a node
        gpu: GPUs of a node
        mem_mb: memory of a node, MB
        h: named resource, instead of cpu, gpu and mem_mb: cpu_8, a100_x8, h100_x8, ...
        image: container image, where the scheduler runs containers
        env: environment variables, A=1,B=2; a value may hold `=`
        mounts: shared storage in containers, as type=volume,src=CLAIM,dst=/data or type=bind,src=/data,dst=/data
        max_restarts: times that the workers are started anew, by torchrun, after one of them failed
        max_retries: times that the scheduler starts the whole job anew after it failed
        rdzv_port: port on the first node at which the nodes find each other
        rdzv_timeout: seconds that a node waits for the others, at the start and after a restart
        grace: seconds that workers have for a checkpoint after SIGTERM or SIGUSR1 (30 where torch is older than 2.12)
    """
    return stage_app("factorize", **locals())


def hash(
    *args: str,
    j: str = "1x1",
    cpu: int = 2,
    gpu: int = 0,
    mem_mb: int = 8192,
    h: Optional[str] = None,
    image: str = torchx.IMAGE,
    env: Optional[str] = None,
    mounts: Optional[List[str]] = None,
    max_restarts: int = 0,
    max_retries: int = 0,
    rdzv_port: int = 29500,
    rdzv_timeout: int = 600,
    grace: int = 60,
) -> specs.AppDef:
    """Make maps of ids to rows: `recpress hash`; the first process works.

    Args:
        args: arguments of `recpress hash`
        j: nodes x processes on each, as 2x8; MIN:MAXx8 for a number of nodes that may change
        cpu: CPU cores of a node
        gpu: GPUs of a node
        mem_mb: memory of a node, MB
        h: named resource, instead of cpu, gpu and mem_mb: cpu_8, a100_x8, h100_x8, ...
        image: container image, where the scheduler runs containers
        env: environment variables, A=1,B=2; a value may hold `=`
        mounts: shared storage in containers, as type=volume,src=CLAIM,dst=/data or type=bind,src=/data,dst=/data
        max_restarts: times that the workers are started anew, by torchrun, after one of them failed
        max_retries: times that the scheduler starts the whole job anew after it failed
        rdzv_port: port on the first node at which the nodes find each other
        rdzv_timeout: seconds that a node waits for the others, at the start and after a restart
        grace: seconds that workers have for a checkpoint after SIGTERM or SIGUSR1 (30 where torch is older than 2.12)
    """
    return stage_app("hash", **locals())


def train(
    *args: str,
    j: str = "1x1",
    cpu: int = 2,
    gpu: int = 0,
    mem_mb: int = 8192,
    h: Optional[str] = None,
    image: str = torchx.IMAGE,
    env: Optional[str] = None,
    mounts: Optional[List[str]] = None,
    max_restarts: int = 3,
    max_retries: int = 0,
    rdzv_port: int = 29500,
    rdzv_timeout: int = 600,
    grace: int = 60,
) -> specs.AppDef:
    """Train the two-tower network: `recpress train` on every process.

    Args:
        args: arguments of `recpress train`
        j: nodes x processes on each, as 2x8; MIN:MAXx8 for a number of nodes that may change
        cpu: CPU cores of a node
        gpu: GPUs of a node
        mem_mb: memory of a node, MB
        h: named resource, instead of cpu, gpu and mem_mb: cpu_8, a100_x8, h100_x8, ...
        image: container image, where the scheduler runs containers
        env: environment variables, A=1,B=2; a value may hold `=`
        mounts: shared storage in containers, as type=volume,src=CLAIM,dst=/data or type=bind,src=/data,dst=/data
        max_restarts: times that the workers are started anew, by torchrun, after one of them failed
        max_retries: times that the scheduler starts the whole job anew after it failed
        rdzv_port: port on the first node at which the nodes find each other
        rdzv_timeout: seconds that a node waits for the others, at the start and after a restart
        grace: seconds that workers have for a checkpoint after SIGTERM or SIGUSR1 (30 where torch is older than 2.12)
    """
    return stage_app("train", **locals())


def evaluate(
    *args: str,
    j: str = "1x1",
    cpu: int = 2,
    gpu: int = 0,
    mem_mb: int = 8192,
    h: Optional[str] = None,
    image: str = torchx.IMAGE,
    env: Optional[str] = None,
    mounts: Optional[List[str]] = None,
    max_restarts: int = 0,
    max_retries: int = 0,
    rdzv_port: int = 29500,
    rdzv_timeout: int = 600,
    grace: int = 60,
) -> specs.AppDef:
    """Rank held-out rows: `recpress evaluate` on every process.

    Args:
        args: arguments of `recpress evaluate`
        j: nodes x processes on each, as 2x8; MIN:MAXx8 for a number of nodes that may change
        cpu: CPU cores of a node
        gpu: GPUs of a node
        mem_mb: memory of a node, MB
        h: named resource, instead of cpu, gpu and mem_mb: cpu_8, a100_x8, h100_x8, ...
        image: container image, where the scheduler runs containers
        env: environment variables, A=1,B=2; a value may hold `=`
        mounts: shared storage in containers, as type=volume,src=CLAIM,dst=/data or type=bind,src=/data,dst=/data
        max_restarts: times that the workers are started anew, by torchrun, after one of them failed
        max_retries: times that the scheduler starts the whole job anew after it failed
        rdzv_port: port on the first node at which the nodes find each other
        rdzv_timeout: seconds that a node waits for the others, at the start and after a restart
        grace: seconds that workers have for a checkpoint after SIGTERM or SIGUSR1 (30 where torch is older than 2.12)
    """
    return stage_app("evaluate", **locals())


def pipeline(
    *args: str,
    j: str = "1x1",
    cpu: int = 2,
    gpu: int = 0,
    mem_mb: int = 8192,
    h: Optional[str] = None,
    image: str = torchx.IMAGE,
    env: Optional[str] = None,
    mounts: Optional[List[str]] = None,
    max_restarts: int = 3,
    max_retries: int = 0,
    rdzv_port: int = 29500,
    rdzv_timeout: int = 600,
    grace: int = 60,
) -> specs.AppDef:
    """Factorize, hash, train, evaluate in one allocation: `recpress pipeline`. A stage that is whole is skipped.

    Args:
        args: arguments of `recpress pipeline`
        j: nodes x processes on each, as 2x8; MIN:MAXx8 for a number of nodes that may change
        cpu: CPU cores of a node
        gpu: GPUs of a node
        mem_mb: memory of a node, MB
        h: named resource, instead of cpu, gpu and mem_mb: cpu_8, a100_x8, h100_x8, ...
        image: container image, where the scheduler runs containers
        env: environment variables, A=1,B=2; a value may hold `=`
        mounts: shared storage in containers, as type=volume,src=CLAIM,dst=/data or type=bind,src=/data,dst=/data
        max_restarts: times that the workers are started anew, by torchrun, after one of them failed
        max_retries: times that the scheduler starts the whole job anew after it failed
        rdzv_port: port on the first node at which the nodes find each other
        rdzv_timeout: seconds that a node waits for the others, at the start and after a restart
        grace: seconds that workers have for a checkpoint after SIGTERM or SIGUSR1 (30 where torch is older than 2.12)
    """
    return stage_app("pipeline", **locals())


def bench(
    *args: str,
    j: str = "1x1",
    cpu: int = 2,
    gpu: int = 0,
    mem_mb: int = 8192,
    h: Optional[str] = None,
    image: str = torchx.IMAGE,
    env: Optional[str] = None,
    mounts: Optional[List[str]] = None,
    max_restarts: int = 0,
    max_retries: int = 0,
    rdzv_port: int = 29500,
    rdzv_timeout: int = 600,
    grace: int = 60,
) -> specs.AppDef:
    """Measure: `recpress bench run`; benchmarks that know no ranks on one process, `-j 1x1`.

    Args:
        args: arguments of `recpress bench run`; after another `--` those of the benchmark itself
        j: nodes x processes on each, as 2x8; MIN:MAXx8 for a number of nodes that may change
        cpu: CPU cores of a node
        gpu: GPUs of a node
        mem_mb: memory of a node, MB
        h: named resource, instead of cpu, gpu and mem_mb: cpu_8, a100_x8, h100_x8, ...
        image: container image, where the scheduler runs containers
        env: environment variables, A=1,B=2; a value may hold `=`
        mounts: shared storage in containers, as type=volume,src=CLAIM,dst=/data or type=bind,src=/data,dst=/data
        max_restarts: times that the workers are started anew, by torchrun, after one of them failed
        max_retries: times that the scheduler starts the whole job anew after it failed
        rdzv_port: port on the first node at which the nodes find each other
        rdzv_timeout: seconds that a node waits for the others, at the start and after a restart
        grace: seconds that workers have for a checkpoint after SIGTERM or SIGUSR1 (30 where torch is older than 2.12)
    """
    return stage_app("bench run", **locals())
