import errno
import os

import numpy as np
import pytest
import xxhash

from recpress.trainer.checkpoint import file_bytes
from recpress.trainer.checkpoint.file_bytes import CHECKSUM, PAGE, describe, write

BLOCK = 4 * PAGE


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Each file is several writes."""
    monkeypatch.setattr(file_bytes, "_WRITE", BLOCK)


def pages(count, seed=0):
    """Random ones at a multiple of PAGE in memory."""
    memory = np.zeros((count + 1) * PAGE, np.uint8)
    memory = memory[-memory.ctypes.data % PAGE :][: count * PAGE]
    memory[:] = np.random.default_rng(seed).integers(0, 256, len(memory))
    return memory


def check(path, content, said):
    assert path.read_bytes() == content
    assert said == describe(path) == {"size": len(content), CHECKSUM: xxhash.xxh3_128(content).hexdigest()}


@pytest.mark.parametrize("count", [0, 1, 9, 12])
def test_what_is_said_of_a_file_is_so(tmp_path, count):
    content = pages(count)
    check(tmp_path / "file", content.tobytes(), write(tmp_path / "file", content.data))


@pytest.mark.parametrize("summed", [0, 1, PAGE, BLOCK, BLOCK + 5, 9 * PAGE])
def test_a_checksum_that_was_begun_goes_on(tmp_path, summed):
    content = pages(9)
    begun = xxhash.xxh3_128(content[:summed].data)
    for _ in range(2):
        check(tmp_path / "file", content.tobytes(), write(tmp_path / "file", content.data, begun, summed))


def test_writes_are_direct_where_they_can_be(tmp_path, monkeypatch):
    try:
        os.close(os.open(tmp_path / "probe", os.O_WRONLY | os.O_CREAT | os.O_DIRECT))
    except OSError:
        pytest.skip("this filesystem knows no direct writes")
    flags, wrote = [], os.write
    monkeypatch.setattr(os, "write", lambda handle, block: flags.append(direct(handle)) or wrote(handle, block))
    write(tmp_path / "file", pages(9).data)
    assert flags == [True, True, True]


def direct(handle):
    with open(f"/proc/self/fdinfo/{handle}") as file:
        found = next(line for line in file if line.startswith("flags"))
    return bool(int(found.split()[1], 8) & os.O_DIRECT)


def test_what_is_not_aligned_takes_the_other_way(tmp_path):
    for content in (pages(9)[3:], pages(9)[: 8 * PAGE + 5]):
        check(tmp_path / "file", content.tobytes(), write(tmp_path / "file", content.data))


@pytest.mark.parametrize("refuses", ["open", "first write", "second write"])
def test_a_filesystem_that_refuses_direct_writes_gets_others(tmp_path, monkeypatch, refuses):
    opened, wrote, asked = os.open, os.write, []

    def refusing_open(path, flags, *mode):
        if refuses == "open" and flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return opened(path, flags, *mode)

    def refusing_write(handle, block):
        asked.append(direct(handle))
        if asked[-1] and len(asked) == {"first write": 1, "second write": 2}.get(refuses):
            raise OSError(errno.EINVAL, "Invalid argument")
        return wrote(handle, block)

    monkeypatch.setattr(os, "open", refusing_open)
    monkeypatch.setattr(os, "write", refusing_write)
    content = pages(11)
    said = write(tmp_path / "file", content.data)
    check(tmp_path / "file", content.tobytes(), said)
    assert asked[-1] is False


def test_a_write_that_came_short_goes_on_where_it_ended(tmp_path, monkeypatch):
    wrote = os.write
    monkeypatch.setattr(os, "write", lambda handle, block: wrote(handle, block[: max(PAGE, len(block) // 2)]))
    content = pages(9)
    check(tmp_path / "file", content.tobytes(), write(tmp_path / "file", content.data))


def test_a_full_disk_is_named_with_the_file(tmp_path, monkeypatch):
    wrote, asked = os.write, []

    def full(handle, block):
        asked.append(block)
        if len(asked) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return wrote(handle, block)

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match="No space left on device") as error:
        write(tmp_path / "file", pages(9).data)
    assert error.value.filename == str(tmp_path / "file")


@pytest.mark.parametrize("at", [0, 4999, 9 * PAGE - 1])
def test_one_bit_changes_the_checksum(tmp_path, at):
    said = write(tmp_path / "file", pages(9).data)
    content = bytearray((tmp_path / "file").read_bytes())
    content[at] ^= 1
    (tmp_path / "file").write_bytes(content)
    assert describe(tmp_path / "file")["size"] == said["size"]
    assert describe(tmp_path / "file")[CHECKSUM] != said[CHECKSUM]
