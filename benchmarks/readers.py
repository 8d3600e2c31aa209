"""Ways to read Parquet into KeyedJaggedTensors: bare decoding, our stream, and the alternatives of a TorchRec user.

All but the bare one return the same: a KeyedJaggedTensor of the ids, the label and the floats, made by the stream
itself (`KeyedBatches`) or from the peers' columns by `Assembler`. Peers read in the order of the file; none of them has
our shuffle.
"""

from __future__ import annotations

import importlib.util
import logging
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, cast

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from torchrec import KeyedJaggedTensor

from recpress.benchmarks.synthetic_logs import SyntheticLog
from recpress.data.config import SampleConfig, Schema, StreamConfig
from recpress.data.dataset.log import open_log
from recpress.data.dataset.side_table import JaggedColumn
from recpress.data.stream.keyed import KeyedBatches
from recpress.data.stream.loader import InteractionStream

Columns = dict[str, torch.Tensor | JaggedColumn]
Read = Callable[[], float]
"""Reads the log, or for the slow ones a part of it; returns the rows of the log that it came past."""


class Assembler:
    """Columns of a batch -> (KeyedJaggedTensor, label (B,), floats (B, F) or None). Lengths and offsets of keys with
    one id a row are made once for each batch size."""

    def __init__(self, made: SyntheticLog) -> None:
        self.made = made
        self._kept: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def __call__(self, columns: Columns) -> tuple[KeyedJaggedTensor, torch.Tensor, torch.Tensor | None]:
        made = self.made
        label = columns[made.label]
        assert isinstance(label, torch.Tensor)
        floats = None
        if made.floats:
            floats = torch.stack([cast(torch.Tensor, columns[name]) for name in made.floats], dim=1)
        parts = [columns[key] for key in made.keys]
        values = [part.values if isinstance(part, JaggedColumn) else part for part in parts]
        size = len(label)
        lengths, offsets = self._scalar(size)
        if made.lists:
            one = lengths[:size]
            lengths = torch.cat([part.lengths if isinstance(part, JaggedColumn) else one for part in parts])
            offsets = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
        features = KeyedJaggedTensor(
            keys=list(made.keys),
            values=torch.cat(values),
            lengths=lengths,
            offsets=offsets,
            stride=size,
            length_per_key=[len(part) for part in values],
        )
        return features, label, floats

    def _scalar(self, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        if size not in self._kept:
            keys = len(self.made.keys)
            self._kept[size] = torch.ones(keys * size, dtype=torch.int64), torch.arange(keys * size + 1)
        return self._kept[size]


def hand_over(features: KeyedJaggedTensor, label: torch.Tensor, floats: torch.Tensor | None) -> None:
    """Receives the batches of every reader, as a trainer would; tests replace it."""


def warmed() -> None:
    """What a process does at its first batch, whoever reads it, is not part of reading."""
    torch.set_num_threads(1)
    logging.getLogger("torch.fx._symbolic_trace").setLevel(logging.ERROR)  # of TorchRec's own code
    warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
    warnings.filterwarnings("ignore", message=".*set_vital.*")
    made = SyntheticLog("", (), Schema(), ("user_id",))
    features, _, _ = Assembler(made)({"user_id": torch.zeros(1, dtype=torch.int64), "label": torch.ones(1)})
    features.to_dict()
    pa.array([1]).to_numpy()  # Arrow imports pandas if it is installed


def bare(made: SyntheticLog, threads: int) -> Read:
    """The limit: whole row groups decoded by so many threads, Arrow's own threads off, and let go."""

    def read() -> float:
        footers = [pq.read_metadata(file) for file in made.files]
        groups = [(k, group) for k, footer in enumerate(footers) for group in range(footer.num_row_groups)]

        def decode(place: tuple[int, int]) -> int:
            with pq.ParquetFile(made.files[place[0]], metadata=footers[place[0]]) as parquet:
                return parquet.read_row_group(place[1], columns=made.columns, use_threads=False).num_rows

        with ThreadPoolExecutor(threads) as pool:
            return sum(pool.map(decode, groups))

    return read


def ours(made: SyntheticLog, config: StreamConfig, sample: SampleConfig | None = None) -> Read:
    """The stream, all features on; each reading is the next epoch of the same stream."""
    streams: list[InteractionStream] = []

    def read() -> float:
        if not streams:
            log = open_log(made.folder, made.schema, pairs=False)
            streams.append(InteractionStream(log.train, log.schema, config, sample=sample))
        stream = streams[0]
        for batch in KeyedBatches(stream, made.keys):
            assert batch.labels is not None
            hand_over(batch.sparse_features, batch.labels, batch.dense_features)
        stream.set_epoch(stream.epoch + 1)
        return stream.rows.num_rows

    return read


class ArrowBatches(IterableDataset):
    """A plain `iter_batches` loop; DataLoader workers share the row groups. With `rate`, a random mask a batch."""

    def __init__(self, made: SyntheticLog, size: int, rate: float = 1.0) -> None:
        self.made, self.size, self.rate = made, size, rate

    def __iter__(self) -> Iterator[Columns]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        for file in self.made.files:
            with pq.ParquetFile(file) as parquet:
                mine = list(range(worker, parquet.num_row_groups, workers))
                size = round(self.size / self.rate)
                for batch in parquet.iter_batches(size, mine, columns=self.made.columns, use_threads=False):
                    if self.rate < 1:
                        batch = batch.filter(pa.array((torch.rand(batch.num_rows) < self.rate).numpy()))
                    yield tensors(batch)


def tensors(batch: pa.RecordBatch | pa.Table) -> Columns:
    """Arrow -> torch without a copy, lists included."""
    found: Columns = {}
    for name in batch.schema.names:
        column = batch.column(name)
        if isinstance(column, pa.ChunkedArray):
            column = column.combine_chunks()
        if pa.types.is_list(column.type):
            lengths = torch.from_numpy(column.value_lengths().to_numpy()).long()
            found[name] = JaggedColumn(torch.from_numpy(column.flatten().to_numpy()), lengths)
        else:
            found[name] = torch.from_numpy(column.to_numpy())
    return found


def loop(made: SyntheticLog, size: int, workers: int = 0, rate: float = 1.0, limit: float | None = None) -> Read:
    """The `iter_batches` loop in torch's DataLoader."""
    return lambda: _drain(
        made, DataLoader(ArrowBatches(made, size, rate), batch_size=None, num_workers=workers), limit, 1 / rate
    )


def stateful(made: SyntheticLog, size: int) -> Read:
    """The same loop in torchdata's StatefulDataLoader."""

    def read() -> float:
        from torchdata.stateful_dataloader import StatefulDataLoader

        return _drain(made, StatefulDataLoader(ArrowBatches(made, size), batch_size=None, num_workers=0))

    return read


def hugging_face(made: SyntheticLog, size: int, form: str, limit: float | None = None) -> Read:
    """`datasets` streaming: form `rows` (torch format in a DataLoader), `torch` or `arrow` (`.iter(batch_size)`)."""

    def read() -> float:
        from datasets import load_dataset

        opened = load_dataset(
            "parquet", data_files=list(made.files), split="train", streaming=True, columns=made.columns
        )
        if form == "arrow":
            return _drain(made, map(tensors, opened.with_format("arrow").iter(batch_size=size)), limit)
        opened = opened.with_format("torch")
        # a tensor a row costs the same in batches of any size; small ones end near the limit
        batches = DataLoader(opened, batch_size=min(size, 256)) if form == "rows" else opened.iter(batch_size=size)
        return _drain(made, (_jagged(made, batch) for batch in batches), limit)

    return read


def _jagged(made: SyntheticLog, batch: dict[str, Any]) -> Columns:
    for name in made.lists:  # a list of tensors
        lists = batch[name]
        batch[name] = JaggedColumn(torch.cat(list(lists)), torch.tensor([len(part) for part in lists]))
    return batch


def _drain(made: SyntheticLog, batches: Iterable[Columns], limit: float | None = None, scale: float = 1.0) -> float:
    """All batches, or those of the first `limit` seconds."""
    assemble, rows, end = Assembler(made), 0.0, None if limit is None else time.perf_counter() + limit
    for columns in batches:
        features, label, floats = assemble(columns)
        hand_over(features, label, floats)
        rows += len(label) * scale
        if end is not None and time.perf_counter() > end:
            break
    return rows


@dataclass(frozen=True)
class Peer:
    """A way to read, by its name in the table. `package`: what it needs beyond recpress; `slow`: reads a part."""

    name: str
    read: Read
    workers: int = 0
    package: str | None = None
    slow: bool = False

    @property
    def missing(self) -> bool:
        return self.package is not None and importlib.util.find_spec(self.package) is None


def peers(made: SyntheticLog, size: int, seconds: float) -> list[Peer]:
    """Those that read all rows. The slow ones get so many seconds each; lists come a tensor a row from `datasets`."""
    found = [
        Peer("iter_batches, DataLoader, 0 workers", loop(made, size)),
        Peer("iter_batches, DataLoader, 2 workers", loop(made, size, 2), workers=2),
        Peer("torchdata StatefulDataLoader", stateful(made, size), package="torchdata"),
        Peer("datasets, arrow .iter(batch)", hugging_face(made, size, "arrow"), package="datasets"),
        Peer("datasets, torch .iter(batch)", hugging_face(made, size, "torch", seconds), package="datasets", slow=True),
    ]
    if not made.lists:  # torch's collate cannot make batches of lists of any length
        found.append(
            Peer("datasets, torch, rows", hugging_face(made, size, "rows", seconds), package="datasets", slow=True)
        )
    return found
