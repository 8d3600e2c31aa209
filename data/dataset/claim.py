"""One run at a time writes an output. A second run fails at its start, not at its end.

On a local or network disk the claim is a lock (`flock`) on the file `.NAME.lock`, next to the target. The kernel
releases it when its process ends, however it ends, so a killed run never blocks the next one. NFS applies such locks
to all of its clients. A file system without locks (Lustre mounted without `-o flock`) gives a warning, and the second
of two runs fails when it commits.

An object store has no locks. There the claim is an object next to the target, `TARGET.lock`, that its run rewrites
every `BEAT_SECONDS`. Another run replaces it if that process has ended (on this machine), or if it does not change for
`STALE_SECONDS` (on another machine). Two runs that start within the same fraction of a second may both continue; then
the second one fails when it commits.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import shutil
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from hashlib import sha256
from pathlib import Path
from typing import IO, Any

from recpress.data.dataset import object_store
from recpress.data.dataset.files import is_remote, resolve
from recpress.data.errors import InputError

logger = logging.getLogger(__name__)

BEAT_SECONDS = 10.0
STALE_SECONDS = 25.0
_SETTLE_SECONDS = 0.2  # after which two runs that wrote the object at the same time both read the same content
_LONGEST_NAME = 255  # bytes of a file's name, on the usual file systems
_NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)


class _Held:
    """A claim of this process, and how many calls of `take` share it."""

    users = 1

    def release(self) -> None: ...


_HELD: dict[str, _Held] = {}
_GUARD = threading.Lock()


@contextmanager
def claimed(path: str | Path) -> Iterator[None]:
    """Claim the target `path` for this process until the block ends. A process may claim a target several times.

    Raises:
        InputError: another run has claimed it, or the lock cannot be created.
    """
    take(path)
    try:
        yield
    finally:
        release(path)


def take(path: str | Path) -> None:
    """As `claimed`, until as many calls of `release`. A new claim removes the temporary files of a killed run."""
    key = _key(path)
    with _GUARD:
        if held := _HELD.get(key):
            held.users += 1
            return
        _HELD[key] = _Object(str(path)) if is_remote(path) else _File(Path(key))


def release(path: str | Path) -> None:
    """End one `take`; do nothing if there is none."""
    key = _key(path)
    with _GUARD:
        if (held := _HELD.get(key)) is None:
            return
        held.users -= 1
        if held.users:
            return
        del _HELD[key]
    held.release()


def hidden(path: Path, suffix: str) -> Path:
    """A hidden name in the folder of `path`, not longer than file systems allow."""
    name, end = path.name, f".{suffix}"
    room = _LONGEST_NAME - len(end.encode()) - 1
    if len(name.encode()) > room:
        name = name.encode()[: room - 9].decode(errors="ignore") + "-" + sha256(name.encode()).hexdigest()[:8]
    return path.parent / f".{name}{end}"


class _File(_Held):
    """A lock on a file next to the target."""

    def __init__(self, path: Path) -> None:
        self._name = hidden(path, "lock")
        self._file: IO[str] | None = None
        self._made = [folder for folder in path.parents if not folder.exists()]
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            while self._file is None:
                self._file = self._locked(path)
        except OSError as error:
            raise InputError(f"{path}: cannot create files next to it: {error.strerror}") from error
        for leftover in path.parent.glob(_literal(hidden(path, "tmp-").name) + "*"):
            shutil.rmtree(leftover, ignore_errors=True)

    def _locked(self, path: Path) -> IO[str] | None:
        """The locked file; None if the previous run removed it between opening and locking."""
        file = open(self._name, "a+")  # noqa: SIM115
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                file.seek(0)
                content = file.read()
                file.close()
                if error.errno in (errno.EAGAIN, errno.EACCES):
                    raise InputError(_refusal(path, content)) from None
                raise
            logger.warning(
                "%s: its file system has no locks, so a second run that writes here fails only at its end", path
            )
            return file
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), os.stat(self._name)):
                file.truncate(0)
                file.write(json.dumps(_identity()))
                file.flush()
                return file
        file.close()
        return None

    def release(self) -> None:
        assert self._file is not None
        self._name.unlink(missing_ok=True)  # while it is locked, so that a run that has opened it notices
        with suppress(OSError):
            fcntl.flock(self._file, fcntl.LOCK_UN)  # also if a forked process has it open
        self._file.close()
        for folder in self._made:
            with suppress(OSError):  # not empty: the run has written into it
                folder.rmdir()


class _Object(_Held):
    """An object next to the target that a thread rewrites."""

    def __init__(self, path: str) -> None:
        self._address = object_store.beside(path, ".lock")
        self._who = {**_identity(), "token": uuid.uuid4().hex}
        self._beats = 0
        self._ended = threading.Event()
        found = self._read()
        if found and not _is_dead(found):
            until = time.monotonic() + STALE_SECONDS
            while time.monotonic() < until and self._read() == found:
                time.sleep(min(1.0, STALE_SECONDS / 4))
            if (now := self._read()) and now != found:
                raise InputError(_refusal(path, now))
        self._write()
        time.sleep(_SETTLE_SECONDS)
        now = self._read()
        if now and json.loads(now).get("token") != self._who["token"]:
            raise InputError(_refusal(path, now))
        self._thread = threading.Thread(target=self._beat, name="recpress-claim", daemon=True)
        self._thread.start()

    def _read(self) -> str:
        try:
            return object_store.read_bytes(self._address).decode(errors="replace")
        except FileNotFoundError:
            return ""

    def _write(self) -> None:
        self._beats += 1
        object_store.write_bytes(self._address, json.dumps({**self._who, "beats": self._beats}).encode())

    def _beat(self) -> None:
        while not self._ended.wait(BEAT_SECONDS):
            with suppress(InputError, OSError):  # the run itself reports the fault of the store
                self._write()

    def release(self) -> None:
        self._ended.set()
        self._thread.join()
        with suppress(InputError, OSError):
            object_store.remove(self._address)


def _key(path: str | Path) -> str:
    if is_remote(path):
        return str(path).rstrip("/")
    text = resolve(path)[1] if "://" in str(path) else str(path)
    return os.path.join(
        os.path.realpath(os.path.dirname(os.path.abspath(text))), os.path.basename(os.path.abspath(text))
    )


def _identity() -> dict[str, Any]:
    return {"host": socket.gethostname(), "machine": _machine(), "pid": os.getpid(), "since": f"{datetime.now():%F %T}"}


def _machine() -> str:
    """The same for all processes that see each other's process ids."""
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")
    return uuid.uuid4().hex


def _is_dead(content: str) -> bool:
    """Whether the process that wrote this ran on this machine and has ended."""
    try:
        who = json.loads(content)
        if who["machine"] != _machine():
            return False
        os.kill(int(who["pid"]), 0)
    except ProcessLookupError:
        return True
    except (ValueError, KeyError, TypeError, OSError):
        return False
    return False


def _refusal(path: str | Path, content: str) -> str:
    who: dict[str, Any] = {}
    with suppress(ValueError):
        who = json.loads(content)
    by = f" (process {who['pid']} on {who['host']}, since {who['since']})" if who else ""
    return f"{path}: another run writes to it{by}; wait for that run, stop it, or choose another output"


def _literal(name: str) -> str:
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)
