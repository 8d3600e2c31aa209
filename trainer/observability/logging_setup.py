"""The one logging handler of the command line: lines on stderr as text or JSON, each with the rank and the stage.

Modules log to `logging.getLogger(__name__)`. Without this handler, as in a program that imports recpress, nothing is
printed: logging belongs to the host program. Imports no torch.

    text   12:03:44 train [rank 1]: warning: skipping corrupt row group ...
    JSON   {"time": "...", "level": "warning", "stage": "train", "rank": 1, "logger": "recpress....", "message": "..."}
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Literal, TextIO

LogFormat = Literal["text", "json"]
FORMATS: tuple[LogFormat, ...] = ("text", "json")
VARIABLE = "RECPRESS_LOG_FORMAT"
"""Environment variable of the format; the option --log-format sets it, so that subprocesses follow."""

_stage = "recpress"
_formatter: logging.Formatter | None = None


@contextmanager
def logging_to_stderr(stage: str) -> Iterator[None]:
    """Log to stderr within the block, in the format that `VARIABLE` names; leave the logging setup as it was after it.

    The handler is that of the root logger, so that warnings of libraries have the same format. If the host program has
    root handlers, recpress gets a handler and the root logger does not change; if a root handler writes to a terminal
    stream too, the lines of recpress do not propagate to it, so that each appears once.
    """
    global _formatter
    handler = _StderrHandler()
    as_json = log_format() == "json"
    before, _formatter = _formatter, _Json() if as_json else _Text()
    handler.setFormatter(_formatter)
    ours = logging.getLogger("recpress")
    logger, level, propagates = ours if logging.root.handlers else logging.root, ours.level, ours.propagate
    ours.propagate = propagates and not any(map(_writes_to_console, logging.root.handlers))
    logger.addHandler(handler)
    ours.setLevel(logging.INFO)
    logging.captureWarnings(as_json)
    try:
        with stage_name(stage):
            yield
    finally:
        logging.captureWarnings(False)
        ours.setLevel(level)
        ours.propagate = propagates
        logger.removeHandler(handler)
        _formatter = before


@contextmanager
def stage_name(name: str) -> Iterator[None]:
    """The stage that log lines name within the block, on every thread."""
    global _stage
    before, _stage = _stage, name
    try:
        yield
    finally:
        _stage = before


def log_from_signal_handler(name: str, message: str) -> None:
    """Log a line while other code may be writing to stderr, whose buffer must not be entered twice."""
    if _formatter is not None:
        record = logging.LogRecord(name, logging.INFO, "", 0, message, None, None)
        os.write(2, f"{_formatter.format(record)}\n".encode())


def log_format() -> LogFormat:
    """The format of log lines; text if the environment names none that exists."""
    return "json" if os.environ.get(VARIABLE) == "json" else "text"


def shows_bars(stream: TextIO) -> bool:
    """Whether progress is a bar on this stream: a terminal, with text. Otherwise progress is log lines."""
    return stream.isatty() and log_format() == "text"


def _writes_to_console(handler: logging.Handler) -> bool:
    streams = (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__)
    return any(getattr(handler, "stream", None) is stream for stream in streams)


class _StderrHandler(logging.StreamHandler[TextIO]):
    """Writes to `sys.stderr` as it is at the time of a record, above the progress bars of a terminal."""

    def __init__(self) -> None:
        super().__init__(sys.stderr)

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        tqdm = sys.modules.get("tqdm")
        if tqdm is None or not self.stream.isatty():
            super().emit(record)
            return
        try:
            tqdm.tqdm.write(self.format(record), file=self.stream)
            self.flush()
        except Exception:
            self.handleError(record)


class _Text(logging.Formatter):
    def __init__(self) -> None:
        super().__init__("%(message)s")

    def format(self, record: logging.LogRecord) -> str:
        rank = _rank()
        where = "" if rank is None else f" [rank {rank}]"
        text = super().format(record)
        if record.levelno >= logging.ERROR and record.name.startswith("recpress"):  # ends the command
            return f"recpress{where}: error: {text}"
        time = datetime.fromtimestamp(record.created).strftime("%H:%M:%S")
        level = "" if record.levelno == logging.INFO else f"{record.levelname.lower()}: "
        return f"{time} {_stage}{where}: {level}{text.removeprefix(f'{_stage}: ')}"  # progress may have the same name


class _Json(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        fields: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "stage": _stage,
            "rank": _rank() or 0,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        return json.dumps(fields, ensure_ascii=False, default=str)


def _rank() -> int | None:
    """The rank that a launcher gave this process; None without a launcher."""
    rank = os.environ.get("RANK", "")
    return int(rank) if rank.isdecimal() else None
