"""Versions of recpress, its packages and the device. Imports no torch: the command line checks versions before that."""

from __future__ import annotations

import importlib.metadata
import logging
import os
import platform
import re
import sys

from recpress.data.errors import InputError

logger = logging.getLogger(__name__)

KNOWN_SETS: tuple[dict[str, str], ...] = (
    {"torch": "2.13", "torchrec": "1.8", "fbgemm-gpu": "1.8"},
    {"torch": "2.11", "torchrec": "1.6", "fbgemm-gpu": "1.6"},
)
"""Sets that recpress is tested with, newest first. fbgemm's kernels load only into the torch they were built for."""

_DISTRIBUTIONS = {
    "torch": ("torch",),
    "torchrec": ("torchrec", "torchrec-cpu", "torchrec-nightly"),
    "fbgemm-gpu": ("fbgemm-gpu", "fbgemm-gpu-cpu", "fbgemm-gpu-nightly", "fbgemm-gpu-nightly-cpu"),
}


def versions() -> dict[str, str]:
    """Names and versions of the interpreter, the packages and, once torch is imported, the device."""
    found = {"python": platform.python_version(), "processors": str(os.cpu_count())}
    for name in ("recpress", "torch", "torchrec", "fbgemm-gpu-cpu", "fbgemm-gpu", "numpy", "pyarrow"):
        if version := _version(name):
            found[name] = version
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        found["device"] = torch.cuda.get_device_name()
    return found


def version_line() -> str:
    """What `recpress --version` prints: recpress and the set that it runs on."""
    found = installed_set()
    parts = [f"{name} {found[name] or 'not installed'}" for name in _DISTRIBUTIONS]
    return f"recpress {_version('recpress') or 'not installed (source tree)'} ({', '.join(parts)})"


def installed_set() -> dict[str, str | None]:
    """Installed versions of torch, torchrec and fbgemm-gpu; None for one that is not installed."""
    return {
        name: next((found for name in distributions if (found := _version(name))), None)
        for name, distributions in _DISTRIBUTIONS.items()
    }


def check_set(found: dict[str, str | None] | None = None) -> None:
    """Refuse torch, torchrec and fbgemm-gpu that do not match; warn of a set that is not in `KNOWN_SETS`.

    Args:
        found: versions by name; the installed ones by default. None for a package that is not installed passes: some
            commands do without it, and others name it when they import it.

    Raises:
        InputError: a part of a known set together with other versions, or a set older than all known ones.
    """
    present = {name: version for name, version in (found or installed_set()).items() if version}
    short = {name: ".".join(re.findall(r"\d+", version)[:2]) for name, version in present.items()}
    if not short or any(short.items() <= known.items() for known in KNOWN_SETS):
        return
    shown = ", ".join(f"{name} {version}" for name, version in present.items())
    expected = " or ".join(", ".join(f"{name} {version}" for name, version in known.items()) for known in KNOWN_SETS)
    torch = short.get("torch")
    known_torch = [known["torch"] for known in KNOWN_SETS]
    newer = {name: _number(version) > _number(KNOWN_SETS[0][name]) for name, version in short.items()}
    if torch in known_torch or not all(newer.values()):
        raise InputError(
            f"versions do not match: {shown}; expected {expected}; install a matching set (scripts/install.sh)"
        )
    if os.environ.get("RANK", "0") == "0":
        logger.warning("untested versions: %s; tested are %s", shown, expected)


def _number(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
