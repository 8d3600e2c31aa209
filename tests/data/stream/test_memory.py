"""What the stream takes: memory, and the time that it says it takes."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from recpress.data.config import SampleConfig, Schema, StreamConfig
from recpress.data.dataset.log import Log, open_log
from recpress.data.stream.loader import InteractionStream


def stream(log: Log, config: StreamConfig, **kwargs) -> InteractionStream:
    return InteractionStream(log.train, log.schema, config, **kwargs)


def numbers(folder: Path, rows: int, group: int) -> Log:
    user = np.arange(rows)
    table = pa.table({"user_id": user, "item_id": user % 1000, "label": (user % 2).astype(np.float32)})
    pq.write_table(table, folder / "train.parquet", row_group_size=group)
    return open_log(folder, Schema(label="label"))


PEAK = """
import sys, threading, torch
from recpress.data.config import Schema, StreamConfig
from recpress.data.dataset.log import open_log
from recpress.data.stream.loader import InteractionStream

def anonymous():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))

torch.set_num_threads(1)
log = open_log(sys.argv[1], Schema(label="label"))
config = StreamConfig(batch_size=1024, buffer_rows=1 << 18, num_threads=1)
stream = InteractionStream(log.train, log.schema, config)
before, most, end = anonymous(), 0, threading.Event()

def watch():
    global most
    while not end.wait(0.002):
        most = max(most, anonymous())

watcher = threading.Thread(target=watch, daemon=True)
watcher.start()
for batch in stream:
    pass
end.set()
watcher.join()
print(most - before, stream.memory_bound())
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_memory_stays_below_the_bound(tmp_path):
    numbers(tmp_path, 3_000_000, 1 << 17)
    command = [sys.executable, "-X", "faulthandler", "-c", PEAK, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    peak, bound = map(int, done.stdout.split())
    assert peak <= bound
    assert peak >= 0.5 * bound  # a bound that says something


def test_the_bound_follows_the_configuration(tmp_path):
    log = numbers(tmp_path, 400_000, 10_000)

    def bound(world=1, **change):
        config = StreamConfig(**{"batch_size": 64, "buffer_rows": 50_000, "interleave": 4, "num_threads": 1, **change})
        return InteractionStream(log.train, log.schema, config, world=world).memory_bound()

    assert bound(buffer_rows=100_000) > bound() + 50_000 * 20
    assert bound(interleave=8) > bound()
    assert bound(num_threads=3) > bound(num_threads=1) + 2 * 10_000 * 20
    assert bound(world=2) < bound()


def test_batches_that_are_kept_are_not_overwritten(tmp_path):
    log = numbers(tmp_path, 60_000, 1000)
    part = stream(log, StreamConfig(batch_size=50, buffer_rows=4000, interleave=4))
    kept = list(part)
    assert torch.equal(torch.cat([batch.user for batch in kept]).sort().values, torch.arange(60_000))
    assert torch.equal(torch.cat([batch.item for batch in kept]), torch.cat([batch.user for batch in kept]) % 1000)
    del kept
    part.set_epoch(1)
    assert sum(batch.size for batch in part) == 60_000


def test_statistics(tmp_path):
    log = numbers(tmp_path, 200_000, 20_000)
    part = stream(log, StreamConfig(batch_size=1000, num_threads=2), sample=SampleConfig(rate=0.5))
    rows = sum(batch.size for batch in part)
    stats = part.stats()
    assert stats.rows_per_second * stats.seconds == pytest.approx(rows)
    read = log.train.files[0].metadata
    size = sum(read.row_group(g).column(c).total_compressed_size for g in range(10) for c in range(3))
    assert stats.bytes_per_second * stats.seconds == pytest.approx(size)
    shares = stats.as_dict()
    assert min(shares[name] for name in ("read", "decode", "sample", "shuffle", "assemble")) > 0
    assert sum(shares[name] for name in ("read", "decode", "sample", "room")) <= 1.001
    assert shares["shuffle"] <= 1.001
    assert part.stats().rows_per_second == 0  # since the last call
