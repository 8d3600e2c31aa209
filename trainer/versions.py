"""What ran: for reports."""

from __future__ import annotations

import importlib.metadata
import os
import platform

import torch


def versions() -> dict[str, str]:
    """Names and versions of the interpreter, the packages and the device."""
    found = {"python": platform.python_version(), "processors": str(os.cpu_count())}
    for name in ("recpress", "torch", "torchrec", "fbgemm-gpu-cpu", "fbgemm-gpu", "numpy", "pyarrow"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    if torch.cuda.is_available():
        found["device"] = torch.cuda.get_device_name()
    return found
