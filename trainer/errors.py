"""Errors of a run, and which of them a user can fix. Does not import torch, because the command line reports them.

Exit statuses of every command: 0 done; 1 a bug, or another rank was lost; 2 an error that the user can fix; 75 stopped
by a signal, rerun the same command to resume; 128 + the signal's number if there is nothing to resume.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from opcode import opname
from types import TracebackType

from recpress.data.errors import InputError

logger = logging.getLogger(__name__)


class RankFailed(RuntimeError):
    """Another rank failed; the message says which and why."""


class OutOfMemory(InputError):
    """A training step ran out of memory; the message says where, and what makes it smaller."""


class Preempted(RuntimeError):
    """A signal stopped the run; the message says where the same command resumes.

    Args:
        alone: whether other ranks may not know of it yet.
    """

    def __init__(self, message: str, *, alone: bool = False) -> None:
        super().__init__(message)
        self.alone = alone


class Signalled(BaseException):
    """A signal ends a command without a state to resume from. Its unfinished output is removed."""

    def __init__(self, number: int, name: str) -> None:
        super().__init__(name)
        self.number, self.name = number, name


@contextmanager
def same_command_resumes() -> Iterator[None]:
    """Within the block a signal raises `Preempted` instead of `Signalled`, because the same command resumes."""
    try:
        yield
    except Signalled as signalled:
        raise Preempted(f"stopped by {signalled.name}; rerun the same command to resume", alone=True) from None


PREEMPTED_STATUS = 75
"""Exit status of a run that was preempted: EX_TEMPFAIL of sysexits.h, "try again"."""

CHECKPOINT_THREAD = "checkpoint"
"""Name of the thread that writes a checkpoint. A process that ends by an error does not wait for it."""

_MEMORY = ("out of memory", "can't allocate memory", "cannot allocate memory", "not enough memory")
_PEERS = ("connection closed by peer", "connection reset by peer", "broken pipe", "timed out waiting")
_SET = ("torch", "torchrec", "fbgemm_gpu")
_DEVICES = (
    "no cuda",
    "invalid device ordinal",
    "nvidia driver",
    "no kernel image",
    "all cuda-capable devices are busy",
)


_NCCL = ("no socket interface found", "failed to open libnccl", "network is unreachable", "nccl_socket_ifname")


def _installed_set(text: str) -> str | None:
    """What is wrong with the installed set of torch, torchrec and fbgemm, if this error comes of it."""
    low = text.lower()
    if "fbgemm" not in low:
        return None
    if "undefined symbol" in low or "has no attribute" in low or "does not exist" in low:
        return f"fbgemm does not match torch: {text}; expected the versions of one set: scripts/install.sh"
    if "from the 'cuda' backend" in low or "'cuda' backend" in low:
        return (
            f"fbgemm is a CPU build: {text}; expected fbgemm-gpu of the CUDA set: RECPRESS_SET=cuda scripts/install.sh"
        )
    return None


def explain(error: BaseException) -> str | None:
    """The error in one line if a user can fix its cause; None if it is a bug of recpress.

    A ValueError is an error of the user only if recpress raises it for bad input. One from within numpy, torch or
    Python is a bug.
    """
    text = one_line(error)
    if isinstance(error, (InputError, RankFailed, Preempted)):
        return text
    if is_out_of_memory(error):
        return f"out of memory: {text}; expected more memory, fewer rows a batch, or more processes"
    if isinstance(error, ModuleNotFoundError) and str(error.name).partition(".")[0] in _SET:
        return (
            f"{error.name} is not installed; expected a matching set of torch, torchrec and fbgemm: scripts/install.sh"
        )
    if isinstance(error, (OSError, ImportError, AttributeError, RuntimeError)) and (found := _installed_set(text)):
        return found
    if isinstance(error, RuntimeError) and "nccl" in text.lower() and any(words in text.lower() for words in _NCCL):
        return (
            f"NCCL finds no network: {text}; expected NCCL_SOCKET_IFNAME to name an interface of `ip link`, lo for "
            "ranks of one machine"
        )
    if isinstance(error, OSError):
        return text
    if isinstance(error, RuntimeError) and any(words in text.lower() for words in _DEVICES):
        return f"the device cannot be used: {text}; --device cpu does not need it"
    if _is_a(error, "pyarrow.lib", "ArrowException") or isinstance(error, UnicodeDecodeError):
        return text
    if _is_a(error, "torch.distributed", "DistNetworkError") or _is_a(error, "torch.distributed", "DistStoreError"):
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        return f"the ranks cannot connect to {where}: {text}; check the address, and that the port is free"
    if isinstance(error, RuntimeError) and "address already in use" in text.lower():
        return f"{text}; choose another port"
    if isinstance(error, RuntimeError) and any(words in text.lower() for words in _PEERS):
        return f"another rank is lost: {text}; its own output says why"
    if isinstance(error, ValueError) and _raised_by_us(error.__traceback__):
        return text
    return None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the host or a GPU has no memory left."""
    return isinstance(error, MemoryError) or any(words in str(error).lower() for words in _MEMORY)


def status_of(error: BaseException) -> int:
    """Exit status of an error that `explain` knows: 2, or 1 if another rank was lost."""
    text = explain(error)
    return 1 if text is None or text.startswith("another rank is lost") else 2


def one_line(error: BaseException) -> str:
    """The message of an error, without line breaks."""
    if isinstance(error, OSError) and not isinstance(error, InputError) and error.filename and error.strerror:
        hint = "; free some space, or choose another disk" if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        return f"{error.filename}: {error.strerror}{hint}"
    return " ".join(str(error).split()) or type(error).__name__


def record(error: BaseException) -> None:
    """Write the error file that torchrun names, so that its summary and `torchx status` show the cause."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not path:
        return
    message = {"message": one_line(error), "extraInfo": {"timestamp": str(int(time.time()))}}
    try:
        with open(path, "w", encoding="utf-8") as file:
            json.dump({"message": message}, file)
    except OSError as problem:  # the error itself is what matters
        logger.warning("%s: cannot write torchrun's error file: %s", path, problem)


def report(line: str) -> None:
    """Log an error that ends this process. Without logging, as in a program that imports recpress, print it: nothing
    else would say why the process ended."""
    handlers = (*logging.getLogger("recpress").handlers, *logging.root.handlers)
    if any(not isinstance(handler, logging.NullHandler) for handler in handlers):
        logger.error("%s", line)
    else:
        print(f"recpress [rank {os.environ.get('RANK', '0')}]: error: {line}", file=sys.stderr, flush=True)


def _is_a(error: BaseException, module: str, name: str) -> bool:
    """Whether it is an instance of a class of a package that may not be imported yet."""
    kind = getattr(sys.modules.get(module), name, None)
    return isinstance(kind, type) and isinstance(error, kind)


def _raised_by_us(trace: TracebackType | None) -> bool:
    """Whether a `raise` in recpress.data or recpress.modules, which check their input, raised it."""
    if trace is None:
        return False
    while trace.tb_next is not None:
        trace = trace.tb_next
    module = str(trace.tb_frame.f_globals.get("__name__", ""))
    if not f"{module}.".startswith(("recpress.data.", "recpress.modules.")):
        return False
    return opname[trace.tb_frame.f_code.co_code[trace.tb_lasti]] == "RAISE_VARARGS"
