"""Resolve requirements/*.in into the pinned requirements/*.txt: `python scripts/lock.py`.

CPU and CUDA differ in the build of torch that pip finds; the CUDA list is resolved without any extra
index or link folder of this machine, so that it holds the public build and its libraries.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent.parent / "requirements"
PUBLIC = {"PIP_FIND_LINKS": "", "PIP_EXTRA_INDEX_URL": "", "PIP_CONFIG_FILE": os.devnull}


def resolve(inputs: list[str], env: dict[str, str]) -> dict[str, str]:
    """Names and versions that pip would install for these requirement files, without installing."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--dry-run",
        "--ignore-installed",
        "--report",
        "-",
    ]
    for name in inputs:
        command += ["-r" if name.endswith(".in") else "-c", str(FOLDER / name)]
    report = subprocess.run(command, env={**os.environ, **env}, check=True, capture_output=True, text=True).stdout
    found = (package["metadata"] for package in json.loads(report)["install"])
    return {package["name"].lower().replace("_", "-"): package["version"].split("+")[0] for package in found}


def write(name: str, packages: dict[str, str]) -> None:
    lines = ["# Made by scripts/lock.py; do not edit."]
    lines += [f"{package}=={version}" for package, version in sorted(packages.items())]
    (FOLDER / name).write_text("\n".join(lines) + "\n")
    print(f"{name}: {len(packages)} packages")


if __name__ == "__main__":
    write("cuda.txt", resolve(["runtime.in"], PUBLIC))
    # CUDA is the superset: the CPU list keeps its versions, less what only the CUDA build of torch asks for.
    write("cpu.txt", resolve(["runtime.in", "cuda.txt"], {}))
    for extra in ("dev", "docs", "bench"):
        runtime = resolve(["runtime.in", "cpu.txt"], {})
        both = resolve(["runtime.in", f"{extra}.in", "cpu.txt"], {})
        write(f"{extra}.txt", {name: both[name] for name in both.keys() - runtime.keys()})
