"""The TorchX application that a component describes."""

from __future__ import annotations

import itertools
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from torchx import specs
from torchx.components import dist
from torchx.specs.finder import ComponentValidationException

from recpress.launch.resources import RESOURCES

ENV = {
    # Restarted workers otherwise read stale addresses from the agent's store (pytorch issue 135712).
    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
}

SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
"""torchrun hands these on to its workers, and waits for them. SIGUSR1, which Slurm can send before it takes a node away
(`SBATCH_SIGNAL`), would otherwise kill torchrun itself."""


def stage_app(stage: str, *, args: tuple[str, ...], **options: Any) -> specs.AppDef:
    """`recpress STAGE ARGS` on every process; `options` as of `app`. A stage of two words is named by the first.

    Raises:
        ComponentValidationException: an argument or an option that cannot be used.
    """
    words = stage.split()
    _check(words, args)
    return app(words[0], {"m": "recpress.trainer.cli"}, args=(*words, *args), **options)


def app(
    component: str,
    program: dict[str, str],
    *,
    args: tuple[str, ...],
    j: str,
    cpu: int,
    gpu: int,
    mem_mb: int,
    h: str | None,
    image: str,
    env: str | dict[str, str] | None,
    mounts: list[str] | None,
    max_restarts: int,
    max_retries: int,
    rdzv_port: int,
    rdzv_timeout: int,
    grace: int,
) -> specs.AppDef:
    """TorchX's `dist.ddp` with what it has no options for: torchrun's restarts, time limits and signals.

    Raises:
        ComponentValidationException: an option that cannot be used; `torchx run` prints it and exits with 1.
    """
    shape = re.fullmatch(r"(?:(\d+):)?(\d+)x(\d+)", j)
    if shape is None or min(int(number) for number in shape.groups(default="1")) < 1:
        raise ComponentValidationException(f"-j is '{j}', expected NODESxPROCESSES, as 2x8, or MIN:MAXxPROCESSES")
    try:
        resource = RESOURCES[h]() if h in RESOURCES else specs.resource(cpu=cpu, gpu=gpu, memMB=mem_mb, h=h)
    except KeyError:
        others = "or one of TorchX's (gpu.small, aws_p4d.24xlarge, ...)"
        raise ComponentValidationException(f"-h is '{h}', expected one of {', '.join(RESOURCES)}, {others}") from None
    if 0 < resource.gpu < int(shape[3]):
        raise ComponentValidationException(f"-j is '{j}', but a node has {resource.gpu} GPUs, one for each process")
    for name, value in (("max_restarts", max_restarts), ("max_retries", max_retries), ("grace", grace)):
        if value < 0:
            raise ComponentValidationException(f"--{name} is {value}, expected 0 or more")
    try:
        specs.parse_mounts(mounts or [])
    except (KeyError, ValueError) as error:
        raise ComponentValidationException(
            f"--mounts is '{','.join(mounts or [])}', expected type=TYPE,src=SOURCE,dst=FOLDER: {error}"
        ) from None
    made = dist.ddp(
        *args,
        **program,
        name=f"recpress/{component}",
        image=image,
        j=j,
        env={**ENV, "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(grace), **_variables(env)},
        mounts=mounts,
        max_retries=max_retries,
        rdzv_port=rdzv_port,
    )
    (role,) = made.roles
    role.name = component
    role.resource = resource
    _, _, rest = role.args[-1].partition(" ")
    options = {
        "max_restarts": max_restarts,
        "rdzv_conf": f"join_timeout={rdzv_timeout},read_timeout={rdzv_timeout}",
        "signals_to_handle": SIGNALS,
    }
    words = itertools.chain.from_iterable((f"--{name}", str(value)) for name, value in options.items())
    role.args[-1] = f"{_torchrun()} {shlex.join(words)} {rest}"
    return made


def _variables(env: str | dict[str, str] | None) -> dict[str, str]:
    """`A=1,B=2` as a dictionary: a comma, or `;`, ends a value where another NAME= follows."""
    if env is None or isinstance(env, dict):
        return env or {}
    pairs = [pair.partition("=") for pair in re.split(r"[,;](?=[A-Za-z_]\w*=)", env)]
    for name, sign, _ in pairs:
        if not sign or not re.fullmatch(r"[A-Za-z_]\w*", name):
            raise ComponentValidationException(
                f"--env is '{env}', expected NAME=VALUE,NAME=VALUE; a value may be empty"
            )
    return {name: value for name, _, value in pairs}


def _torchrun() -> str:
    """The start of a shell command: torchrun of this interpreter, whose environment need not be activated; where that
    is not there, as in a container image, the one on PATH."""
    python = shlex.quote(sys.executable)
    has_torch = 'import importlib.util as u, sys; sys.exit(u.find_spec("torch") is None)'
    return (
        f"if {python} -c {shlex.quote(has_torch)} 2>/dev/null; then set -- {python} -m torch.distributed.run; "
        'else set -- torchrun; fi; exec "$@"'
    )


def _check(stage: list[str], args: tuple[str, ...]) -> None:
    """Let the stage read its arguments here, in the fraction of a second that it takes, rather than after the queue.

    Another process, because launch knows no other package of ours. Where they are not installed, or the --config file
    is on the cluster alone, the stage itself will say.
    """
    config = next((value for key, value in itertools.pairwise(args) if key == "--config"), None)
    config = next((arg.partition("=")[2] for arg in args if arg.startswith("--config=")), config)
    if config is not None and not Path(config).exists():
        return
    command = [sys.executable, "-m", "recpress.trainer.cli", "check", *stage, *args]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 2:
        raise ComponentValidationException((done.stderr or done.stdout).strip())
