"""The command line: `recpress COMMAND [--config FILE.toml] [--key value ...]`.

Imports no torch: the stage is imported once the configuration is valid.
"""

from __future__ import annotations

import argparse
import atexit
import difflib
import importlib
import logging
import os
import select
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from types import FrameType
from typing import NamedTuple

from recpress.data.errors import InputError
from recpress.trainer.config import TrainConfig
from recpress.trainer.errors import (
    CHECKPOINT_THREAD,
    PREEMPTED_STATUS,
    OutOfMemory,
    Preempted,
    Signalled,
    explain,
    record,
    status_of,
)
from recpress.trainer.features.config import FeatureConfig
from recpress.trainer.observability.logging_setup import FORMATS, logging_to_stderr
from recpress.trainer.observability.logging_setup import VARIABLE as LOG_FORMAT_VARIABLE
from recpress.trainer.options import SHELLS, completion, parse
from recpress.trainer.train.config import (
    TWO_TOWER,
    TrainModelConfig,
    chosen_model,
    completed,
    main_options,
    model_options,
)
from recpress.trainer.versions import check_set, version_line

logger = logging.getLogger(__name__)

LEAVE_SECONDS = 3.0
"""How long a process that ends with an error waits for a checkpoint that is being written."""


class Command(NamedTuple):
    """A subcommand."""

    config: str
    """Its configuration, as `module:class`."""
    stage: str
    """The function that runs it, as `module:function`."""
    summary: str
    main: str = ""
    """Options that its short `--help` lists; by default those that are in no section."""
    passes_on: bool = False
    """Whether what follows `--` goes to the processes that it starts, as the field `args`."""
    with_model: str = ""
    """Its configuration with --model of another model than the two-tower network, as `module:class`."""
    main_with_model: str = ""
    """Options that its short `--help` then lists before those of `train --model`."""
    clusters: bool = False
    """Whether it clusters ids, in many short parallel regions. On cores that other processes use too, OpenMP threads
    that spin while they wait made it twenty times slower, so they sleep unless the user sets OMP_WAIT_POLICY."""


COMMANDS = {
    "synth": Command(
        "recpress.trainer.prepare.config:SynthCommand",
        "recpress.trainer.prepare.stages:synth",
        "write a synthetic log, with tastes to learn",
        main="out users items rows negatives seed overwrite",
    ),
    "synth-criteo": Command(
        "recpress.trainer.prepare.config:SynthCriteoCommand",
        "recpress.trainer.prepare.stages:synth_criteo",
        "write a synthetic log with Criteo's columns",
        main="out rows test-rows ids seed overwrite",
    ),
    "ingest": Command(
        "recpress.trainer.prepare.config:IngestCommand",
        "recpress.trainer.prepare.stages:ingest",
        "convert a public format or a table to a log",
        main="input out format user item label time categorical floats holdout overwrite",
    ),
    "split": Command(
        "recpress.trainer.prepare.config:SplitConfig",
        "recpress.trainer.prepare.stages:split",
        "hold one row of each user out of a log",
        main="data out by negatives schema.user schema.item schema.time overwrite",
    ),
    "sample": Command(
        "recpress.trainer.prepare.config:SampleCommand",
        "recpress.trainer.prepare.stages:sample",
        "write a sample of a log once, for the many runs that follow",
        main="data out sample.kind sample.rate sample.seed shuffle overwrite",
    ),
    "factorize": Command(
        "recpress.trainer.factorize.config:FactorizeConfig",
        "recpress.trainer.factorize.stage:factorize",
        "factorize the interactions of a log",
        main="data out method als.factors als.max-factors als.sweeps crossfit-rate schema.user schema.item "
        "device overwrite",
    ),
    "hash": Command(
        "recpress.trainer.hash.config:HashStageConfig",
        "recpress.trainer.hash.stage:make_maps",
        "map the ids of tables to fewer embedding rows, by counts and vectors",
        main="data out factors method share rows bytes embedding features extend overwrite",
        clusters=True,
    ),
    "train": Command(
        "recpress.trainer.config:TrainConfig",
        "recpress.trainer.train.stage:train_any",
        "train the two-tower network, or another with --model, on a log or a sample of it",
        main="data out factors hash warm-start model.tables.strategy sample.rate epochs stream.batch-size "
        "evaluation.metric checkpoint.minutes device overwrite",
        with_model="recpress.trainer.train.config:TrainModelConfig",
    ),
    "evaluate": Command(
        "recpress.trainer.evaluate.config:EvaluateConfig",
        "recpress.trainer.evaluate.stage:evaluate",
        "rank held-out rows with a model or with factors; of a model of labels, measure its predictions",
        main="data model out parts factory evaluation.protocol evaluation.k device",
    ),
    "export": Command(
        "recpress.trainer.export.config:ExportConfig",
        "recpress.trainer.export.stage:export",
        "write a model as programs that serve without recpress, with vocabularies, item vectors and an index",
    ),
    "recommend": Command(
        "recpress.trainer.recommend.config:RecommendConfig",
        "recpress.trainer.recommend.stage:recommend",
        "write the best items of each user, with raw ids",
        main="model data out k exclude-seen index on-unknown users-per-part device overwrite",
    ),
    "pipeline": Command(
        "recpress.trainer.pipeline.config:PipelineConfig",
        "recpress.trainer.pipeline.stage:pipeline",
        "factorize, hash, train (the two-tower network, or another with --train.model) and evaluate; resumes",
        main="data out stages schema.user schema.item hash.share train.model.tables.strategy train.sample.rate "
        "train.epochs device",
        with_model="recpress.trainer.pipeline.config:PipelineModelConfig",
        main_with_model="data out stages schema.user schema.item schema.label train.sample.rate train.epochs "
        "train.evaluation.metric train.label-threshold train.dim device",
    ),
    "tune": Command(
        "recpress.trainer.tune.config:TuneConfig",
        "recpress.trainer.tune.stage:tune_any",
        "choose settings of the factorization and the network, or of a --train.model, within a time budget, as TOML",
        with_model="recpress.trainer.tune.config:TuneModelConfig",
        main_with_model="data out minutes trials schema.label train.sample.rate train.evaluation.metric train.epochs "
        "train.label-threshold train.dim seed device overwrite",
    ),
    "plan": Command(
        "recpress.trainer.plan.config:PlanConfig",
        "recpress.trainer.plan.stage:plan",
        "plan a training run, also with --model, on a cluster that need not exist: sharding, memory, number of GPUs",
        main="data users items rows dim share compare json cluster.nodes cluster.ranks-per-node "
        "cluster.memory-gib cluster.device",
        with_model="recpress.trainer.plan.config:PlanModelConfig",
        main_with_model="rows list-length share compare json cluster.nodes cluster.ranks-per-node cluster.memory-gib "
        "cluster.device",
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
        "quality against bytes of the tables and rows read, with a report page",
        clusters=True,
    ),
    "doctor": Command(
        "recpress.trainer.doctor.config:DoctorConfig",
        "recpress.trainer.doctor.stage:doctor",
        "check versions, devices, backends, write access and collective latency",
    ),
    "bench list": Command(
        "recpress.trainer.bench.config:BenchListConfig",
        "recpress.trainer.bench.stages:list_benchmarks",
        "list the benchmarks",
    ),
    "bench run": Command(
        "recpress.trainer.bench.config:BenchRunConfig",
        "recpress.trainer.bench.stages:run",
        "run benchmarks and their peers, on this machine or as a job",
        passes_on=True,
    ),
    "bench page": Command(
        "recpress.trainer.bench.config:BenchPageConfig",
        "recpress.trainer.bench.stages:page",
        "draw the results of benchmarks",
    ),
}

EPILOG = f"""
`recpress COMMAND --help` lists the main options of a command, `--help-all` all of them. `--config FILE.toml` sets any
option from a file; the command line overrides the file. Other commands:
  recpress check COMMAND ...          read the arguments and do nothing
  recpress completion SHELL           print a completion script for {", ".join(SHELLS)}
  recpress --version                  print the versions of recpress, torch, torchrec and fbgemm
With every command: `--log-format json` writes log lines to stderr as JSON (or {LOG_FORMAT_VARIABLE}=json), and
RECPRESS_DEBUG=1 prints the traceback of an error. On several processes:
  torchrun --nproc-per-node 2 -m recpress.trainer.cli COMMAND ...
  torchx run -s local_cwd launch/components.py:run -j 1x2 -- COMMAND ..."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status (see `errors`)."""
    try:
        try:
            return _main(list(sys.argv[1:] if argv is None else argv))
        finally:
            sys.stdout.flush()
    except BrokenPipeError:  # the reader of stdout, such as `head`, has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter flushes stdout at its exit
        return 128 + signal.SIGPIPE


def _main(arguments: list[str]) -> int:
    with logging_to_stderr("recpress"):
        try:
            arguments = _with_log_format(arguments)
        except InputError as error:
            return _failed(error)
    if arguments == ["--version"]:
        print(version_line())
        return 0
    if arguments[:1] == ["completion"]:
        return _completion(arguments[1:])
    only_check = arguments[:1] == ["check"]
    name, rest = _command(arguments[only_check:])
    with logging_to_stderr(name or "recpress"):
        try:
            if name is None:
                raise InputError(_unknown_command(rest))
            config = _config(name, rest)
            if only_check:
                return 0
            if name != "doctor":  # which reports them
                check_set()
            # DDP warns at every start, from C++, that no parameter is unused (see trainer/model/sharding.py).
            os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # read once, when torch is imported
            if COMMANDS[name].clusters:  # read once, when torch is imported with the stage
                os.environ.setdefault("OMP_WAIT_POLICY", "passive")
            with _signals_raise():
                _load(COMMANDS[name].stage)(config)
            return 0
        except Preempted as error:
            record(error)
            if os.environ.get("RANK", "0") == "0":
                logger.warning("%s", error)
            return PREEMPTED_STATUS
        except Signalled as signalled:
            logger.warning("stopped by %s; nothing was written", signalled.name)
            return _leaving(128 + signalled.number)
        except KeyboardInterrupt:
            logger.warning("interrupted")
            return _leaving(130)
        except Exception as error:
            if isinstance(error, BrokenPipeError) and _stdout_is_broken():
                raise
            if isinstance(error, OutOfMemory) and name == "train":
                error = _with_plan(error, config)
            return _failed(error)


def _with_plan(error: OutOfMemory, config: object) -> OutOfMemory:
    """The error with what `recpress plan` predicts, if it plans such a run."""
    if not isinstance(config, TrainConfig):
        return error
    from recpress.trainer.plan.predict import predicted

    device = "cuda" if "cuda" in str(error).lower() else "cpu"
    text = predicted(config, int(os.environ.get("WORLD_SIZE", "1")), device)
    return OutOfMemory(f"{error}; {text}") if text else error


def _stdout_is_broken() -> bool:
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _failed(error: Exception) -> int:
    """Log an error that ends the command, in one line unless it is a bug; returns the exit status."""
    record(error)
    line = explain(error)
    trace = error if line is None or os.environ.get("RECPRESS_DEBUG") else None
    if line is None:
        line = f"{type(error).__name__}: this is a bug of recpress; please report it with the traceback"
    logger.error("%s", line, exc_info=trace)
    return _leaving(status_of(error))


@contextmanager
def _signals_raise() -> Iterator[None]:
    """SIGTERM, SIGUSR1 and SIGHUP raise an exception, so that the command removes unfinished outputs.

    Later signals, as schedulers send, are ignored, so that they do not interrupt the removal. SIGHUP stays ignored
    under nohup.
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

    numbers = [signal.SIGTERM, signal.SIGUSR1]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    before = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _leaving(status: int) -> int:
    """`status`. At exit, pyarrow waits up to a minute for requests to a store that does not respond; if a checkpoint is
    being written, the process now waits for `LEAVE_SECONDS` only."""

    def leave(writer: threading.Thread) -> None:
        writer.join(LEAVE_SECONDS)
        if writer.is_alive():
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)

    for thread in threading.enumerate():
        if thread.name == CHECKPOINT_THREAD:
            atexit.register(leave, thread)  # runs before pyarrow's handler, which was registered at its import
    return status


def _command(arguments: list[str]) -> tuple[str | None, list[str]]:
    """The command at the start of the arguments, or None, and the other arguments. Prints the list of commands for
    `--help`."""
    for words in (2, 1):
        if (name := " ".join(arguments[:words])) in COMMANDS:
            return name, arguments[words:]
    if arguments and not arguments[0].startswith("-"):
        return None, arguments
    width = max(map(len, COMMANDS)) + 2
    listing = "\n".join(f"  {name:{width}}{command.summary}" for name, command in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="recpress",
        usage="recpress COMMAND [--config FILE.toml] [--option value ...]",
        description="Smaller training for recommendation models on TorchRec.\n\ncommands:\n" + listing,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.parse_args(arguments or ["--help"])
    raise SystemExit(0)


def _unknown_command(words: list[str]) -> str:
    if group := [name for name in COMMANDS if name.startswith(f"{words[0]} ")]:
        asked = " ".join(word for word in words[:2] if not word.startswith("-"))
        return f"'{asked}': expected one of {', '.join(group)}"
    near = difflib.get_close_matches(words[0], [*COMMANDS, "check", "completion"], n=1, cutoff=0.6)
    hint = f"nearest is '{near[0]}'; " if near else ""
    return f"unknown command '{words[0]}'; {hint}`recpress --help` lists the commands"


def _with_log_format(arguments: list[str]) -> list[str]:
    """The arguments without --log-format, which is set for this process and those that it starts."""
    own = arguments[: arguments.index("--")] if "--" in arguments else arguments
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--log-format")
    try:
        known, rest = parser.parse_known_args(own)
    except argparse.ArgumentError as error:
        raise InputError(str(error)) from None
    chosen = known.log_format if known.log_format is not None else os.environ.get(LOG_FORMAT_VARIABLE)
    if chosen and chosen not in FORMATS:
        raise InputError(f"log format is '{chosen}', expected one of {', '.join(FORMATS)}")
    if known.log_format:
        os.environ[LOG_FORMAT_VARIABLE] = known.log_format
    return rest + arguments[len(own) :]


def _completion(words: list[str]) -> int:
    if len(words) != 1 or words[0] not in SHELLS:
        with logging_to_stderr("completion"):
            return _failed(InputError(f"expected `recpress completion SHELL`, SHELL one of {', '.join(SHELLS)}"))
    commands = {name: (_load(command.config), command.summary) for name, command in COMMANDS.items()}
    print(completion(commands, words[0], "recpress"))
    return 0


def _config(name: str, rest: list[str]) -> object:
    from recpress.trainer import config_file

    command = COMMANDS[name]
    config = _load(command.config)
    passed: list[str] = []
    if command.passes_on and "--" in rest:
        rest, passed = rest[: rest.index("--")], rest[rest.index("--") + 1 :]
    file_parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    file_parser.add_argument("--config")
    known, rest = file_parser.parse_known_args(config_file.current_arguments(rest))
    content = None
    if known.config is not None:
        content = config_file.for_command(name, config_file.read(known.config), config)
    model = TWO_TOWER
    main, prog, named = command.main.split(), f"recpress {name}", {}
    base = _load(command.with_model) if command.with_model else None
    if base is not None:
        section = "" if issubclass(base, TrainModelConfig) else "train"
        model, rest = chosen_model(rest, content, section)
        of_train = content.get(section) if content is not None and section else content
        if model != TWO_TOWER:
            config, main = model_options(model, base), main_options(model, base, command.main_with_model)
            prog = f"{prog} --{'train.' * bool(section)}model {model}"
            if known.config is not None and isinstance(of_train, dict):
                prefix = "train.features" if section else "features"
                named = config_file.named_tables(known.config, of_train.pop("features", {}), FeatureConfig, prefix)
    elif name == "compare hash" and known.config is not None and content is not None:
        named = config_file.named_tables(known.config, content.pop("features", {}), FeatureConfig, "features")
    if known.config is not None:
        rest = config_file.arguments(known.config, config, rest, name, content)
    made = parse(config, rest, prog=prog, summary=command.summary, main=main)
    if model != TWO_TOWER:
        assert base is not None
        return completed(made, base, model, named)
    if named:
        return replace(made, features=named)
    return replace(made, args=tuple(passed)) if passed else made


def _load(place: str):  # type: ignore[no-untyped-def]  # a dataclass or a function
    module, _, attribute = place.partition(":")
    return getattr(importlib.import_module(module), attribute)


if __name__ == "__main__":
    sys.exit(main())
