"""The command line: `recpress COMMAND [--config FILE.toml] [--key value ...]`.

Imports no torch: the stage is imported after its configuration has been read.
"""

from __future__ import annotations

import argparse
import atexit
import difflib
import importlib
import logging
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from types import FrameType
from typing import NamedTuple

from recpress.trainer.errors import (
    CHECKPOINT_THREAD,
    PREEMPTED_STATUS,
    Preempted,
    Signalled,
    explain,
    record,
    status_of,
)

LEAVE_SECONDS = 3.0
"""How long a process that ends by an error lets a checkpoint be written."""


class Command(NamedTuple):
    """A subcommand: where its configuration and its stage function lie, both as `module:name`."""

    config: str
    stage: str
    summary: str
    passes_on: bool = False
    """Whether what stands after `--` goes to what it runs, as the field `args`."""
    clusters: bool = False
    """Whether it clusters ids: many short parallel stretches. On cores that others use, too, OpenMP's threads that spin
    while they wait made it twenty times slower, so that they sleep, unless the user says otherwise."""


COMMANDS = {
    "synth": Command(
        "recpress.trainer.prepare.config:SynthCommand",
        "recpress.trainer.prepare.stages:synth",
        "write a made log with planted tastes",
    ),
    "synth-criteo": Command(
        "recpress.trainer.prepare.config:SynthCriteoCommand",
        "recpress.trainer.prepare.stages:synth_criteo",
        "write a made log with Criteo's columns",
    ),
    "ingest": Command(
        "recpress.trainer.prepare.config:IngestCommand",
        "recpress.trainer.prepare.stages:ingest",
        "convert a public format or a table to a log",
    ),
    "split": Command(
        "recpress.trainer.prepare.config:SplitConfig",
        "recpress.trainer.prepare.stages:split",
        "hold one row of each user out of a log",
    ),
    "sample": Command(
        "recpress.trainer.prepare.config:SampleCommand",
        "recpress.trainer.prepare.stages:sample",
        "write a sample of a log once, for the many runs that follow",
    ),
    "factorize": Command(
        "recpress.trainer.factorize.config:FactorizeConfig",
        "recpress.trainer.factorize.stage:factorize",
        "factorize the interactions of a log",
    ),
    "hash": Command(
        "recpress.trainer.hash.config:HashStageConfig",
        "recpress.trainer.hash.stage:make_maps",
        "map the ids of tables to fewer rows, by counts and an embedding",
        clusters=True,
    ),
    "train": Command(
        "recpress.trainer.config:TrainConfig",
        "recpress.trainer.train.stage:train",
        "train the two-tower network on a log or a sample of it",
    ),
    "evaluate": Command(
        "recpress.trainer.evaluate.config:EvaluateConfig",
        "recpress.trainer.evaluate.stage:evaluate",
        "rank held-out rows with a checkpoint or with factors",
    ),
    "pipeline": Command(
        "recpress.trainer.pipeline.config:PipelineConfig",
        "recpress.trainer.pipeline.stage:pipeline",
        "factorize, hash, train and evaluate; resumes at the first stage that is not complete",
    ),
    "tune": Command(
        "recpress.trainer.tune.config:TuneConfig",
        "recpress.trainer.tune.stage:tune",
        "choose settings of the factorization and the network within a budget, and write them as TOML",
    ),
    "plan": Command(
        "recpress.trainer.plan.config:PlanConfig",
        "recpress.trainer.plan.stage:plan",
        "say what a training run needs of a cluster that need not exist: sharding plan, memory, smallest size",
    ),
    "compare cadc": Command(
        "recpress.trainer.compare.config:CompareCadcConfig",
        "recpress.trainer.compare.cadc:compare_cadc",
        "all strategies of the CADC paper in one run, with a report page",
    ),
    "compare hash": Command(
        "recpress.trainer.compare.config:CompareHashConfig",
        "recpress.trainer.compare.hash:compare_hash",
        "all hashing methods with one backbone and one budget, with a report page",
        clusters=True,
    ),
    "compare both": Command(
        "recpress.trainer.compare.config:CompareBothConfig",
        "recpress.trainer.compare.both:compare_both",
        "quality against bytes of table and rows read, with a report page",
        clusters=True,
    ),
    "bench list": Command(
        "recpress.trainer.bench.config:BenchListConfig",
        "recpress.trainer.bench.stages:list_benchmarks",
        "list the benchmarks",
    ),
    "bench run": Command(
        "recpress.trainer.bench.config:BenchRunConfig",
        "recpress.trainer.bench.stages:run",
        "run benchmarks beside their peers, on this machine or as a job",
        passes_on=True,
    ),
    "bench page": Command(
        "recpress.trainer.bench.config:BenchPageConfig",
        "recpress.trainer.bench.stages:page",
        "draw the results of benchmarks",
    ),
}

EPILOG = """`recpress COMMAND --help` lists the options of a command; `--config FILE.toml` sets any of them
from a file, and the command line overrides it. On several processes:
  torchrun --nproc-per-node 2 -m recpress.trainer.cli COMMAND ...
  torchx run -s local_cwd launch/components.py:train -j 1x2 -- ...
`recpress check COMMAND ...` reads the arguments and does nothing. RECPRESS_DEBUG=1 prints the traceback of an error."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status (see `errors`)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        only_check = arguments[:1] == ["check"]  # `recpress check COMMAND ...`: read the arguments, do nothing
        with _readers_may_leave():
            name, rest = _command(arguments[only_check:])
            config = _config(name, rest)
        if only_check:
            return 0
        # DDP warns at every start, from C++, that no parameter is unused (see trainer/model/sharding.py).
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # read once, when torch is imported
        if COMMANDS[name].clusters:  # read once, when torch is imported with the stage
            os.environ.setdefault("OMP_WAIT_POLICY", "passive")
        _log_plainly()
        with _signals_raise():
            stage = _load(COMMANDS[name].stage)
            stage(config)
    except Preempted as error:
        record(error)
        if os.environ.get("RANK", "0") == "0":
            print(f"recpress: {error}", file=sys.stderr)
        return PREEMPTED_STATUS
    except Signalled as signalled:
        print(f"recpress: stopped by {signalled.name}; nothing was written", file=sys.stderr)
        return _leaving(128 + signalled.number)
    except KeyboardInterrupt:
        print("recpress: interrupted", file=sys.stderr)
        return _leaving(130)
    except Exception as error:
        record(error)
        rank = os.environ.get("RANK")
        where, line = f"recpress{f' [rank {rank}]' if rank else ''}", explain(error)
        if line is None or os.environ.get("RECPRESS_DEBUG"):
            traceback.print_exc()
        if line is None:
            kind = type(error).__name__
            print(f"{where}: {kind}: this is a bug of recpress; please report it with the lines above", file=sys.stderr)
        else:
            print(f"{where}: error: {line}", file=sys.stderr)
        return _leaving(status_of(error))
    return 0


class _Plain(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return f"{record.levelname.lower()}: {super().format(record)}"


def _log_plainly() -> None:
    """`warning: ...`, as the lines that stages print; nothing changes where the host has handlers of its own."""
    if not logging.root.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(_Plain())
        logging.root.addHandler(handler)


@contextmanager
def _signals_raise() -> Iterator[None]:
    """SIGTERM and SIGUSR1 end the command by an exception, so that it removes what it has not finished.

    Only the first one: more of them, as schedulers send, do not disturb the removal.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    raised = False

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal raised
        if not raised:
            raised = True
            raise Signalled(number, signal.Signals(number).name)

    before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _leaving(status: int) -> int:
    """`status`, with which this process will end soon, even where a checkpoint is on its way to a store that does not
    answer: at its exit pyarrow waits for all requests, up to a minute."""

    def leave(writer: threading.Thread) -> None:
        writer.join(LEAVE_SECONDS)
        if writer.is_alive():
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)

    for thread in threading.enumerate():
        if thread.name == CHECKPOINT_THREAD:
            atexit.register(leave, thread)  # before pyarrow's, which was registered when it was imported
    return status


def _command(arguments: list[str]) -> tuple[str, list[str]]:
    two_words = " ".join(arguments[:2])
    if two_words in COMMANDS:
        return two_words, arguments[2:]
    if arguments and arguments[0] in COMMANDS:
        return arguments[0], arguments[1:]
    width = max(map(len, COMMANDS)) + 2
    listing = "\n".join(f"  {name:{width}}{command.summary}" for name, command in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="recpress",
        usage="recpress COMMAND [--config FILE.toml] [--key value ...]",
        description="Smaller training for recommendation models on TorchRec.\n\ncommands:\n" + listing,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    words = [argument for argument in arguments[:2] if not argument.startswith("-")]
    if not arguments or ({"-h", "--help"} & {*arguments} and not words):
        parser.parse_args(["--help"])
    if arguments[0] not in words:
        parser.error(f"'{arguments[0]}' stands where the command is expected, one of: {', '.join(COMMANDS)}")
    names = [name for name in COMMANDS if name.startswith(f"{words[0]} ")]
    given = " ".join(words) if names else words[0]
    nearest = difflib.get_close_matches(given, names or COMMANDS, n=1)
    hint = f"; did you mean '{nearest[0]}'?" if nearest and given not in {name.split()[0] for name in names} else ""
    parser.error(
        f"{'' if names else 'unknown command '}'{given}': expected one of {', '.join(names or COMMANDS)}{hint}"
    )


@contextmanager
def _readers_may_leave() -> Iterator[None]:
    """`recpress COMMAND --help | head`: help whose end nobody reads is no error."""
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is left in the buffer
        raise SystemExit(0) from None


def _config(name: str, rest: list[str]) -> object:
    import tyro

    from recpress.trainer import config_file

    config = _load(COMMANDS[name].config)
    passed: list[str] = []
    if COMMANDS[name].passes_on and "--" in rest:
        rest, passed = rest[: rest.index("--")], rest[rest.index("--") + 1 :]
    file_parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    file_parser.add_argument("--config")
    known, rest = file_parser.parse_known_args(rest)
    if known.config is not None:
        rest = config_file.arguments(known.config, config, rest, name)
    made = tyro.cli(
        config,
        prog=f"recpress {name}",
        description=f"{COMMANDS[name].summary.capitalize()}. Options may be in a TOML file: --config FILE.",
        args=rest,
    )
    return replace(made, args=tuple(passed)) if passed else made


def _load(place: str):  # type: ignore[no-untyped-def]  # a dataclass or a function
    module, _, attribute = place.partition(":")
    return getattr(importlib.import_module(module), attribute)


if __name__ == "__main__":
    sys.exit(main())
