"""`recpress doctor`: the checks, and their result as text or JSON."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from recpress.data.dataset.object_store import cache_folder
from recpress.data.errors import InputError
from recpress.trainer.doctor.config import DoctorConfig
from recpress.trainer.versions import check_set, versions

GIB = 1024**3
MIN_FREE_GIB = 1.0
"""Less free space than this is a warning."""


@dataclass(frozen=True)
class Check:
    """The result of one check on one rank."""

    name: str
    status: Literal["ok", "warning", "error"]
    detail: str
    rank: int = 0


def doctor(config: DoctorConfig) -> list[Check]:
    """Run all checks; rank 0 prints them.

    Raises:
        SystemExit: with status 1 if a check failed.
    """
    rank = int(os.environ.get("RANK", 0))
    steps: dict[str, Callable[[], str]] = {
        "versions": _versions,
        "packages": _packages,
        "devices": _devices,
        "backends": _backends,
        "cache folder": lambda: _writable(cache_folder()),
        "current folder": lambda: _writable(Path.cwd()),
    }
    checks = [_check(name, step, rank) for name, step in steps.items()]
    if any(check.status == "error" for check in checks if check.name in ("versions", "packages", "backends")):
        checks.append(Check("collectives", "error", "not measured, because of the errors above", rank))
    elif "WORLD_SIZE" in os.environ and "MASTER_ADDR" in os.environ:
        from recpress.trainer.doctor.collectives import between_launched_ranks

        checks = [Check(**values) for values in between_launched_ranks([asdict(check) for check in checks])]
    else:
        from recpress.trainer.doctor.collectives import between_two_local_ranks

        checks.append(_check("collectives", lambda: between_two_local_ranks(config.timeout_seconds), rank))
    if rank == 0:
        print(json.dumps(_as_json(checks), indent=1) if config.json else _as_text(checks))
    if any(check.status == "error" for check in checks):
        raise SystemExit(1)
    return checks


def _check(name: str, step: Callable[[], str], rank: int) -> Check:
    try:
        return Check(name, "ok", step(), rank)
    except UserWarning as warning:
        return Check(name, "warning", str(warning), rank)
    except Exception as error:  # whatever is wrong with this installation is the result
        kind = "" if isinstance(error, InputError) else f"{type(error).__name__}: "
        return Check(name, "error", f"{kind}{' '.join(str(error).split())}", rank)


def _versions() -> str:
    check_set()
    return ", ".join(f"{name} {version}" for name, version in versions().items())


def _packages() -> str:
    """Import what every training run imports: a fbgemm that does not fit torch fails here."""
    names = ("torch", "fbgemm_gpu", "torchrec", "pyarrow")
    for name in names:
        importlib.import_module(name)
    return f"imported {', '.join(names)}"


def _devices() -> str:
    import torch

    from recpress.trainer.distributed.process_group import GPU, cuda_problem

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
    found = [f"cpu: {cores} cores, {memory:.1f} GiB"]
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        torch.ones(1, device=f"cuda:{index}").add_(1)  # a driver that is too old fails here
        found.append(f"cuda:{index}: {device.name}, {device.total_memory / GIB:.1f} GiB")
    if len(found) == 1:
        problem = cuda_problem()
        if problem and GPU.exists():
            raise UserWarning(f"{found[0]}; a GPU that torch cannot use: {problem}")
        found.append("no CUDA device")
    return "; ".join(found)


def _backends() -> str:
    import torch
    import torch.distributed as dist

    if not dist.is_gloo_available():
        raise InputError("torch was built without gloo, which every run needs; install another build of torch")
    if dist.is_nccl_available():
        return "gloo, nccl"
    if torch.cuda.is_available():
        raise InputError("torch was built without nccl, which CUDA runs need; install another build of torch")
    return "gloo (no nccl: runs on the CPU only)"


def _writable(folder: Path) -> str:
    """Raises OSError if no file can be written, UserWarning if there is little free space."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".recpress-doctor-") as file:
        file.write(b"x" * 4096)
        file.flush()
        os.fsync(file.fileno())
    free = shutil.disk_usage(folder).free / GIB
    text = f"{folder}: writable, {free:,.1f} GiB free"
    if free < MIN_FREE_GIB:
        raise UserWarning(f"{text}; expected at least {MIN_FREE_GIB:g} GiB")
    return text


def _as_text(checks: list[Check]) -> str:
    several = any(check.rank for check in checks)
    rows = [
        f"{check.status:8} {f'[rank {check.rank}] ' if several else ''}{check.name}: {check.detail}" for check in checks
    ]
    errors = sum(check.status == "error" for check in checks)
    return "\n".join([*rows, f"{errors} checks failed" if errors else "all checks passed"])


def _as_json(checks: list[Check]) -> dict[str, object]:
    ok = all(check.status != "error" for check in checks)
    return {"ok": ok, "versions": versions(), "checks": [asdict(check) for check in checks]}
