"""How many rows per second do the programs of an export take in eager mode, and compiled by AOTInductor?

Needs an export: recpress export --model MODEL --out EXPORT --aot

    python benchmarks/export_speed.py --export EXPORT --out runs/export-speed.json
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch

from recpress.benchmarks.common import arguments, publish, settings_of
from recpress.trainer.export.loader import load

NEEDS = "an export: --export FOLDER"
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
    parser = arguments(__doc__)
    parser.add_argument("--export", required=True, help="folder of an export with --aot")
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    folder = Path(options.export)
    golden = torch.load(folder / "golden.pt", weights_only=True)
    results = []
    for name in json.loads((folder / "manifest.json").read_text())["programs"]:
        times = -(-options.batch // len(golden[name]["output"]))
        inputs = {key: tensor.repeat(times) for key, tensor in golden[name]["inputs"].items()}
        rows = times * len(golden[name]["output"])
        eager, compiled = (per_second(load(folder, name, aot=aot), inputs, rows) for aot in (False, True))
        result = {"program": name, "eager, rows/s": eager, "compiled, rows/s": compiled, "faster": compiled / eager}
        results.append({**result, "load": os.getloadavg()[0]})
    publish(str(__doc__).splitlines()[0], results, out=options.out, settings=settings_of(vars(options)))


if __name__ == "__main__":
    main()
