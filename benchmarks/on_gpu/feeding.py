"""The stream feeding the train loop: how much of a step is waiting for data."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from recpress.benchmarks import synthetic_logs
from recpress.benchmarks.on_gpu.training import TABLES, case_of, subject_of, timed
from recpress.data.config import StreamConfig
from recpress.data.dataset.log import open_log
from recpress.data.negatives.samplers import UniformNegatives
from recpress.data.stream.batch import Batch, BatchBuilder
from recpress.data.stream.loader import InteractionStream


class Clocked:
    """Batches, with the seconds that the loop stood still for them."""

    def __init__(self, batches: Iterable[Batch]) -> None:
        self._batches = iter(batches)
        self.seconds = 0.0

    def __iter__(self) -> Iterator[Batch]:
        while True:
            start = time.perf_counter()
            batch = next(self._batches, None)
            self.seconds += time.perf_counter() - start
            if batch is None:
                return
            yield batch


def rows(device: torch.device, tiny: bool) -> Iterator[dict[str, Any]]:
    """Three times over the same steps: batches that lie on the device already, and the stream with ordinary and with
    pinned memory. `waiting %` is the host's time for the next batch (decoding that is not ahead, and assembly), and
    `slower %` what the stream adds to the steps' wall time: the device waits only as far as that is above zero."""
    steps, batch = 8 if tiny else 300, case_of("trained", tiny).batch
    with tempfile.TemporaryDirectory() as folder:
        made = synthetic_logs.narrow(Path(folder), max(batch * steps, 1000))
        log = open_log(folder, made.schema)
        for tables in TABLES[:1] if tiny else TABLES[:3]:
            # 1 M users and 250,000 items: the log's ids, and more
            case = replace(case_of(tables, tiny), table_rows=1_250_000)
            subject = subject_of(case, tiny, device)
            builder = BatchBuilder(UniformNegatives(case.items, case.negatives), device=device)

            def stream(threads: int, pin: bool, builder: BatchBuilder = builder) -> Iterator[Batch]:
                config = StreamConfig(batch_size=batch, num_threads=threads)
                found = InteractionStream(log.train, log.schema, config, pin_memory=pin)
                return map(builder, islice(found.map(lambda rows: rows), steps))

            ready = list(stream(2, False))
            subject.train(ready[:3])  # warms up
            alone = timed(subject.train, ready, device)
            yield {"tables": tables, "batches": "ready on the device", "ms a step": 1e3 * alone / steps}
            del ready
            for threads in (1,) if tiny else (1, 2, 4):
                for pin in (False, True) if device.type == "cuda" else (False,):
                    batches = Clocked(stream(threads, pin))
                    took = timed(subject.train, batches, device)
                    yield {
                        "tables": tables,
                        "batches": f"stream, {threads} threads{', pinned' if pin else ''}",
                        "ms a step": 1e3 * took / steps,
                        "M rows/s": batch * steps / took / 1e6,
                        "waiting %": 100 * batches.seconds / took,
                        "slower %": 100 * (took / alone - 1),
                    }
            subject.close()
