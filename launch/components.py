"""TorchX components: a command of recpress on every process of one or many nodes.

    torchx run -s local_cwd launch/components.py:run -j 1x2 -- train --data LOG --out OUT

`run` takes the command as its first argument; `train`, `pipeline` and the others are short for it and have the same
options. With recpress installed, `recpress.run` is the same as `launch/components.py:run`. The arguments after `--` are
those of the command, and are checked before anything is submitted. docs/launch/cluster.md is the guide.
"""

from typing import Any, List, Optional  # TorchX reads annotations by these names

from torchx import specs

from recpress.launch.app import SCRIPT, job, shares_options


def run(
    *args: str,
    j: str = "1x1",
    cpu: int = 2,
    gpu: int = 0,
    mem_mb: int = 8192,
    h: Optional[str] = None,
    image: Optional[str] = None,
    env: Optional[str] = None,
    mounts: Optional[List[str]] = None,
    max_restarts: Optional[int] = None,
    max_retries: int = 0,
    rdzv_port: int = 29500,
    rdzv_timeout: int = 600,
    grace: int = 60,
    metadata: Optional[str] = None,
) -> specs.AppDef:
    """Run a command of recpress on every process.

    Args:
        args: the command and its arguments, as `train --data LOG --out OUT`
        j: nodes x processes on each, as 2x8; MIN:MAXx8 for a number of nodes that may change
        cpu: CPU cores of a node
        gpu: GPUs of a node
        mem_mb: memory of a node, MB
        h: named resource, instead of cpu, gpu and mem_mb: cpu_8, a100_x8, h100_x8, ...
        image: container image with recpress; required if the scheduler runs containers
        env: environment variables, A=1,B=2; a value may contain `=`
        mounts: shared storage in containers, as type=volume,src=CLAIM,dst=/data or type=bind,src=/data,dst=/data
        max_restarts: how often torchrun restarts failed workers; 3 for train, pipeline, recommend and script, else 0
        max_retries: how often the scheduler restarts the whole job after it failed
        rdzv_port: port on the first node at which the nodes meet
        rdzv_timeout: seconds that a node waits for the others, at the start and after a restart
        grace: seconds that workers have for a checkpoint after SIGTERM or SIGUSR1 (30 if torch is older than 2.12)
        metadata: KEY=VALUE,...: annotations of Kubernetes pods; kubernetes=FILE merges the YAML file into each pod
    """
    return job(**locals())


@shares_options(run)
def factorize(*args: str, **options: Any) -> specs.AppDef:
    """Factorize a log: `recpress factorize` on every process."""
    return run("factorize", *args, **options)


@shares_options(run)
def hash(*args: str, **options: Any) -> specs.AppDef:
    """Map ids to fewer embedding rows: `recpress hash` on every process."""
    return run("hash", *args, **options)


@shares_options(run)
def train(*args: str, **options: Any) -> specs.AppDef:
    """Train a network: `recpress train` on every process."""
    return run("train", *args, **options)


@shares_options(run)
def evaluate(*args: str, **options: Any) -> specs.AppDef:
    """Rank held-out rows: `recpress evaluate` on every process."""
    return run("evaluate", *args, **options)


@shares_options(run)
def recommend(*args: str, **options: Any) -> specs.AppDef:
    """Write the best items of each user: `recpress recommend` on every process. Skips parts that are complete."""
    return run("recommend", *args, **options)


@shares_options(run)
def pipeline(*args: str, **options: Any) -> specs.AppDef:
    """Factorize, hash, train and evaluate in one allocation: `recpress pipeline`. Skips stages that are complete."""
    return run("pipeline", *args, **options)


@shares_options(run)
def bench(*args: str, **options: Any) -> specs.AppDef:
    """Run benchmarks: `recpress bench run`; those without ranks need `-j 1x1`. Their arguments follow another `--`."""
    return run("bench", "run", *args, **options)


@shares_options(run, "the script and its arguments, as `my_dlrm.py --epochs 3`, or `-m my_package.train`")
def script(*args: str, **options: Any) -> specs.AppDef:
    """Run your own script on every process, with the restarts, signals, grace period and checks of `run`."""
    return run(SCRIPT, *args, **options)
