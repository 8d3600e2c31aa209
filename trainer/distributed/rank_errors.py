"""Errors of one rank become errors of all ranks: raise together, and check that all ranks run the same thing."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
import torch.distributed as dist

from recpress.data.errors import InputError
from recpress.trainer.distributed.heartbeat import waiting_for_ranks
from recpress.trainer.errors import Preempted, RankFailed, explain


@contextmanager
def raise_on_all_ranks() -> Iterator[None]:
    """A block without collectives in which a single rank may fail. If one does, all ranks raise its error at the end.

    Use it for files, columns, shapes, and work of one rank. The end of the block is a collective without a time limit.
    Only errors that a user can fix (`errors.explain`) are shared. Any other error is a bug: its rank ends with a
    traceback, and the watchdog ends the other ranks. Without a process group the block changes nothing.

    Raises:
        InputError: the message of the lowest rank that failed.
    """
    if not dist.is_initialized():
        yield
        return
    problem: str | None = None
    cause: Exception | None = None
    try:
        yield
    except (RankFailed, Preempted):
        raise
    except Exception as error:
        problem, cause = explain(error), error
        if problem is None:
            raise
    problems: list[str | None] = [None] * dist.get_world_size()
    with waiting_for_ranks():
        dist.all_gather_object(problems, problem)
    for text in problems:
        if text is not None:
            raise InputError(text) from cause


def assert_same_across_ranks(**values: str) -> None:
    """Check that all ranks run the same code with the same settings. Collective.

    Args:
        values: name -> value that must be equal on every rank, in addition to the code and torch's version.

    Raises:
        InputError: names what differs and on which ranks. On every rank.
    """
    mine = {"code of recpress": _code_digest(), "torch": str(torch.__version__)} | values
    everyone: list[dict[str, str]] = [{}] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    for name, value in everyone[0].items():
        different = [rank for rank, of_rank in enumerate(everyone) if of_rank.get(name) != value]
        if different:
            rank = different[0]
            raise InputError(
                f"rank {rank} has another {name} than rank 0 ({everyone[rank].get(name)}, expected {value}); "
                f"differs on {len(different)} of {len(everyone)} ranks: install the same version on every node"
            )


def _code_digest() -> str:
    """Version of recpress and a digest of its source."""
    digest = hashlib.sha256()
    root = Path(__file__).resolve().parents[2]
    for folder in ("data", "modules", "trainer"):
        for path in sorted((root / folder).rglob("*.py")):
            digest.update(path.read_bytes())
    try:
        number = version("recpress")
    except PackageNotFoundError:  # run from source
        number = "source"
    return f"{number} {digest.hexdigest()[:12]}"
