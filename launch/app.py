"""The TorchX application that a component describes."""

from __future__ import annotations

import inspect
import itertools
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
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
"""torchrun forwards these signals to its workers and waits for them. SIGUSR1, which Slurm can send before it takes a
node away (`SBATCH_SIGNAL`), would otherwise kill torchrun itself."""


RESTARTS = {"train": 3, "pipeline": 3}
"""Default of max_restarts for the commands that resume from a checkpoint; 0 for others."""


def shares_options(component: Callable[..., specs.AppDef]) -> Callable[[Callable[..., specs.AppDef]], Any]:
    """Decorator for a component that is short for another: gives it the other's signature and help of options."""

    def decorate(alias: Callable[..., specs.AppDef]) -> Callable[..., specs.AppDef]:
        command = alias.__name__ if alias.__name__ != "bench" else "bench run"
        _, _, options = (inspect.getdoc(component) or "").partition("Args:\n")
        lines = [f"    args: arguments of `recpress {command}`", *options.splitlines()[1:]]
        alias.__doc__ = "\n".join([inspect.getdoc(alias) or "", "", "Args:", *lines])
        alias.__signature__ = inspect.signature(component)  # type: ignore[attr-defined]
        return alias

    return decorate


def command_app(
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
    max_restarts: int | str | None,
    max_retries: int,
    rdzv_port: int,
    rdzv_timeout: int,
    grace: int,
) -> specs.AppDef:
    """`recpress ARGS` on every process: TorchX's `dist.ddp`, with torchrun's restarts, time limits and signals.

    Args:
        args: the command and its arguments; the first word names the application.

    Raises:
        ComponentValidationException: an argument or an option is invalid; `torchx run` prints it and exits with 1.
    """
    if not args or args[0].startswith("-"):
        raise ComponentValidationException(
            "expected a command of recpress after `--`, as in `-- train --data LOG --out OUT`"
        )
    _check(args)
    component = args[0]
    try:  # TorchX passes an Optional[int] as text
        max_restarts = RESTARTS.get(component, 0) if max_restarts is None else int(max_restarts)
    except ValueError:
        raise ComponentValidationException(f"--max_restarts is '{max_restarts}', expected 0 or more") from None
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
        m="recpress.trainer.cli",
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
    """`A=1,B=2` as a dictionary: a comma or `;` ends a value if another NAME= follows."""
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
    """The start of a shell command: torchrun of this interpreter, even if its environment is not activated; if this
    interpreter does not exist on the node, as in a container image, the torchrun on PATH."""
    python = shlex.quote(sys.executable)
    has_torch = 'import importlib.util as u, sys; sys.exit(u.find_spec("torch") is None)'
    return (
        f"if {python} -c {shlex.quote(has_torch)} 2>/dev/null; then set -- {python} -m torch.distributed.run; "
        'else set -- torchrun; fi; exec "$@"'
    )


def _check(args: tuple[str, ...]) -> None:
    """Let the command check its arguments now, in a fraction of a second, rather than after the queue.

    In a subprocess, because launch imports no other package of recpress. If recpress is not installed here, or the
    --config file exists on the cluster alone, the command itself reports what is wrong.
    """
    config = next((value for key, value in itertools.pairwise(args) if key == "--config"), None)
    config = next((arg.partition("=")[2] for arg in args if arg.startswith("--config=")), config)
    if config is not None and not Path(config).exists():
        return
    command = [sys.executable, "-m", "recpress.trainer.cli", "check", *args]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 2:
        raise ComponentValidationException((done.stderr or done.stdout).strip())
