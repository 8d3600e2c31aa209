"""The TorchX application that a component describes."""

from __future__ import annotations

import base64
import inspect
import itertools
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torchx
from torchx import specs
from torchx.components import dist
from torchx.specs.finder import ComponentValidationException

from recpress.launch.resources import RESOURCES
from recpress.launch.role import JobRole, merged, read_pod

ENV = {
    # Restarted workers otherwise read stale addresses from the agent's store (pytorch issue 135712).
    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
}

SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
"""torchrun forwards these signals to its workers and waits for them. SIGUSR1, which Slurm can send before it takes a
node away (`SBATCH_SIGNAL`), would otherwise kill torchrun itself."""


SCRIPT = "script"
"""Stands before the user's script, where a command of recpress would be."""

RESTARTS = {"train": 3, "pipeline": 3, "recommend": 3, SCRIPT: 3}
"""Default of max_restarts for what resumes; 0 for other commands."""

LARGEST_CONFIG = 64 * 1024
"""Bytes of a config file that become part of a job's command."""
_CONFIG = "RECPRESS_CONFIG_FILE"
"""Stands in arguments for the config file that the job writes on its node."""
CONFIG_PATH = '"$recpress_config"'


def shares_options(
    component: Callable[..., specs.AppDef], args: str = ""
) -> Callable[[Callable[..., specs.AppDef]], Any]:
    """Decorator for a component with the same options as another: gives it the other's signature and help of options.

    Args:
        args: help of its arguments; by default those of the command that has the component's name.
    """

    def decorate(alias: Callable[..., specs.AppDef]) -> Callable[..., specs.AppDef]:
        command = alias.__name__ if alias.__name__ != "bench" else "bench run"
        _, _, options = (inspect.getdoc(component) or "").partition("Args:\n")
        lines = [f"    args: {args or f'arguments of `recpress {command}`'}", *options.splitlines()[1:]]
        alias.__doc__ = "\n".join([inspect.getdoc(alias) or "", "", "Args:", *lines])
        alias.__signature__ = inspect.signature(component)  # type: ignore[attr-defined]
        return alias

    return decorate


def job(*, args: tuple[str, ...], max_restarts: int | str | None, **options: Any) -> specs.AppDef:
    """`recpress ARGS` on every process, or after the word `script` a Python script.

    A local file after `--config` of a command becomes part of the job.

    Args:
        args: the command and its arguments; the first word names the application.

    Raises:
        ComponentValidationException: an argument or an option is invalid; `torchx run` prints it and exits with 1.
    """
    if args[:1] == (SCRIPT,):
        return _script_job(args[1:], RESTARTS[SCRIPT] if max_restarts is None else max_restarts, options)
    if not args or args[0].startswith("-"):
        raise ComponentValidationException(
            "expected a command of recpress after `--`, as in `-- train --data LOG --out OUT`"
        )
    config = _config_of(args)
    if config is None or Path(config).exists():
        _check(args)
    restarts = RESTARTS.get(args[0], 0) if max_restarts is None else max_restarts
    name, (written, args) = args[0], _with_config(args, config)
    return _app(args, name, module="recpress.trainer.cli", written=written, max_restarts=restarts, **options)


def _script_job(args: tuple[str, ...], max_restarts: int | str, options: dict[str, Any]) -> specs.AppDef:
    module = args[1] if args[:1] == ("-m",) and len(args) > 1 else None
    if module is None and (not args or args[0].startswith("-")):
        raise ComponentValidationException(
            "expected a script after `--`, as in `-- my_dlrm.py --epochs 3`, or `-- -m my_package.train`"
        )
    stem = module.rpartition(".")[2] if module else Path(args[0]).stem
    name = re.sub(r"[^A-Za-z0-9]+", "_", stem).strip("_") or SCRIPT  # TorchX makes a shell variable of it
    what: dict[str, Any] = {"module": module} if module else {"script": args[0]}
    return _app(args[2:] if module else args[1:], name, max_restarts=max_restarts, **what, **options)


def _app(
    args: tuple[str, ...],
    name: str,
    *,
    module: str | None = None,
    script: str | None = None,
    written: str = "",
    j: str,
    cpu: int,
    gpu: int,
    mem_mb: int,
    h: str | None,
    image: str | None,
    env: str | dict[str, str] | None,
    mounts: list[str] | None,
    max_restarts: int | str,
    max_retries: int,
    rdzv_port: int,
    rdzv_timeout: int,
    grace: int,
    metadata: str | None,
) -> specs.AppDef:
    """TorchX's own component for torchrun, with torchrun's restarts, time limits and signals.

    Args:
        written: shell command that writes the file for which `_CONFIG` stands in the arguments.
    """
    try:  # TorchX passes an Optional[int] as text
        max_restarts = int(max_restarts)
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
    for option, value in (("max_restarts", max_restarts), ("max_retries", max_retries), ("grace", grace)):
        if value < 0:
            raise ComponentValidationException(f"--{option} is {value}, expected 0 or more")
    try:
        specs.parse_mounts(mounts or [])
    except (KeyError, ValueError) as error:
        raise ComponentValidationException(
            f"--mounts is '{','.join(mounts or [])}', expected type=TYPE,src=SOURCE,dst=FOLDER: {error}"
        ) from None
    notes = _pairs("metadata", metadata, r"[A-Za-z0-9][\w./-]*")
    pod = read_pod(notes.pop("kubernetes")) if "kubernetes" in notes else {}
    if notes:
        pod = merged({"metadata": {"annotations": notes}}, pod)
    launcher = getattr(dist, "torchrun", dist.ddp)  # its name after TorchX 0.7.0
    made = launcher(
        *args,
        m=module,
        script=script,
        name=f"recpress/{name}",
        image=image or torchx.IMAGE,
        j=j,
        env={**ENV, "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(grace), **_pairs("env", env, r"[A-Za-z_]\w*")},
        mounts=mounts,
        max_retries=max_retries,
        rdzv_port=rdzv_port,
    )
    (plain,) = made.roles
    role = JobRole(**vars(plain), has_image=image is not None, script=script, grace=grace, pod=pod)
    role.name = name
    role.resource = resource
    made.roles = [role]
    made.metadata.update(notes)
    _, _, rest = role.args[-1].partition(" ")
    settings = {
        "max_restarts": max_restarts,
        "rdzv_conf": f"join_timeout={rdzv_timeout},read_timeout={rdzv_timeout}",
        "signals_to_handle": SIGNALS,
    }
    words = itertools.chain.from_iterable((f"--{option}", str(value)) for option, value in settings.items())
    role.args[-1] = f"{written}{_torchrun()} {shlex.join(words)} {rest.replace(_CONFIG, CONFIG_PATH)}"
    return made


def _pairs(option: str, given: str | dict[str, str] | None, name: str) -> dict[str, str]:
    """`A=1,B=2` as a dictionary: a comma or `;` ends a value if another NAME= follows."""
    if given is None or isinstance(given, dict):
        return given or {}
    pairs = [pair.partition("=") for pair in re.split(rf"[,;](?={name}=)", given)]
    for key, sign, _ in pairs:
        if not sign or not re.fullmatch(name, key):
            raise ComponentValidationException(
                f"--{option} is '{given}', expected NAME=VALUE,NAME=VALUE; a value may be empty"
            )
    return {key: value for key, _, value in pairs}


def _torchrun() -> str:
    """The start of a shell command: torchrun of this interpreter, even if its environment is not activated; if this
    interpreter does not exist on the node, as in a container image, the torchrun on PATH."""
    python = shlex.quote(sys.executable)
    has_torch = 'import importlib.util as u, sys; sys.exit(u.find_spec("torch") is None)'
    return (
        f"if {python} -c {shlex.quote(has_torch)} 2>/dev/null; then set -- {python} -m torch.distributed.run; "
        'else set -- torchrun; fi; exec "$@"'
    )


def _config_of(args: tuple[str, ...]) -> str | None:
    """The value of --config."""
    config = next((value for key, value in itertools.pairwise(args) if key == "--config"), None)
    return next((arg.partition("=")[2] for arg in args if arg.startswith("--config=")), config)


def _with_config(args: tuple[str, ...], config: str | None) -> tuple[str, tuple[str, ...]]:
    """A shell command that writes the config file as it is now on the node, and the arguments with that file.

    Pods do not see this machine's disk, and a job that is queued or requeued reads what was checked. A file that does
    not exist here is on the cluster alone; it stays a path. Comments are dropped: the job does not need them.
    """
    if config is None or not Path(config).exists():
        return "", args
    text = Path(config).read_text()
    bare = "\n".join(line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#"))
    try:
        same = tomllib.loads(bare) == tomllib.loads(text)  # not if a line of a text begins with #
    except tomllib.TOMLDecodeError:
        same = False
    content = (bare if same else text).encode()
    if len(content) > LARGEST_CONFIG:
        raise ComponentValidationException(
            f"--config {config}: {len(content)} bytes, expected at most {LARGEST_CONFIG}; put the file on storage that "
            "the job sees, under a path that does not exist here"
        )
    name = shlex.quote(Path(config).name)
    encoded = base64.b64encode(content).decode()
    written = f'recpress_config=$(mktemp -d)/{name} && printf %s {encoded} | base64 -d >"$recpress_config" || exit 1; '
    replaced = (
        _CONFIG if before == "--config" else f"--config={_CONFIG}" if arg.startswith("--config=") else arg
        for before, arg in zip(("", *args), args, strict=False)
    )
    return written, tuple(replaced)


def _check(args: tuple[str, ...]) -> None:
    """Let the command check its arguments now, in a fraction of a second, rather than after the queue.

    In a subprocess, because launch imports no other package of recpress. If recpress is not installed here, the command
    itself reports what is wrong.
    """
    command = [sys.executable, "-m", "recpress.trainer.cli", "check", *args]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 2:
        raise ComponentValidationException((done.stderr or done.stdout).strip())
