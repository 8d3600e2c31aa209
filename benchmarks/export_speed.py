"""Rows per second of the programs of an export: of torch.export in eager mode, and compiled by AOTInductor.

recpress export --model MODEL --out EXPORT --aot && python -m benchmarks.export_speed EXPORT
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch

from recpress.trainer.export.loader import load

SECONDS = 3.0


def per_second(program: Callable[..., torch.Tensor], inputs: dict[str, torch.Tensor], rows: int) -> float:
    """Rows per second."""
    for _ in range(3):
        program(inputs)
    calls, start = 0, time.perf_counter()
    while time.perf_counter() < start + SECONDS:
        program(inputs)
        calls += 1
    return rows * calls / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("export")
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    folder = Path(options.export)
    golden = torch.load(folder / "golden.pt", weights_only=True)
    for name in json.loads((folder / "manifest.json").read_text())["programs"]:
        times = -(-options.batch // len(golden[name]["output"]))
        inputs = {key: tensor.repeat(times) for key, tensor in golden[name]["inputs"].items()}
        rows = times * len(golden[name]["output"])
        eager, compiled = (per_second(load(folder, name, aot=aot), inputs, rows) for aot in (False, True))
        result = {"program": name, "rows": rows, "eager": eager, "compiled": compiled, "speed-up": compiled / eager}
        print(json.dumps({**result, "threads": options.threads, "load": os.getloadavg()[0]}))


if __name__ == "__main__":
    main()
