"""`recpress bench`: list the benchmarks, run them, draw their results."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

from recpress.data.errors import InputError
from recpress.trainer.bench.config import BenchListConfig, BenchPageConfig, BenchRunConfig, benchmarks, chosen

PAGE = "report.html"


def list_benchmarks(config: BenchListConfig) -> None:
    """Print each benchmark's question, and how long it takes."""
    known = benchmarks()
    width = max(map(len, known)) + 2
    for benchmark in known.values():
        words = benchmark.summary + (f" (needs {benchmark.needs})" if benchmark.needs else "")
        print(textwrap.fill(words, 110, initial_indent=f"{benchmark.name:{width}}", subsequent_indent=" " * width))
        if benchmark.takes:
            print(textwrap.fill(benchmark.takes, 110, initial_indent=" " * width, subsequent_indent=" " * width))


def run(config: BenchRunConfig) -> None:
    """Run the benchmarks one after the other, then draw the page of all results in `config.out`.

    If a benchmark fails, the others still run. The time of each is printed. Under torchrun one benchmark per job.

    Raises:
        InputError: a benchmark without `RANKS` on several processes; some have failed.
    """
    todo = chosen(config.names)
    world, first = int(os.environ.get("WORLD_SIZE", 1)), os.environ.get("RANK", "0") == "0"
    if world > 1 and not (len(todo) == 1 and todo[0].ranks):
        able = ", ".join(name for name, benchmark in benchmarks().items() if benchmark.ranks)
        raise InputError(
            f"{world} processes: expected one benchmark that runs on several ({able}); start the others on one, -j 1x1"
        )
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    failed, took = [], {}
    for benchmark in todo:
        size = benchmark.small if config.size == "small" else benchmark.full
        words = [str(benchmark.path), *size, *config.args, "--out", str(out / f"{benchmark.name}.json")]
        if first:
            print(f"\n== {benchmark.name} ==", flush=True)
        began = time.monotonic()
        done = subprocess.run([sys.executable, *words], check=False)
        took[benchmark.name] = time.monotonic() - began
        if done.returncode:
            failed.append(f"{benchmark.name} (exit status {done.returncode})")
    if first:
        page(BenchPageConfig(folder=config.out))
        print(f"seconds: {', '.join(f'{name} {seconds:.0f}' for name, seconds in took.items())}", flush=True)
    if failed:
        raise InputError(f"failed: {', '.join(failed)}; see their output above")


def page(config: BenchPageConfig) -> None:
    """Draw the results of a folder as one HTML file. Raises InputError for a file that is no result."""
    from recpress.trainer.bench.page import read_results, write_page  # imports matplotlib

    out = config.out or str(Path(config.folder) / PAGE)
    write_page(out, read_results(config.folder))
    print(f"\nreport: {out}")
