"""The two-tower network in the loops that are compared: ours, a bare TorchRec loop, and plain PyTorch under DDP."""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torchrec.distributed.model_parallel import DistributedModelParallel

from recpress.benchmarks.plain_torch import PlainTwoTower
from recpress.benchmarks.synthetic_logs import keyed, random_map, skewed_ids
from recpress.data.config import LayoutConfig, SampleConfig, StreamConfig
from recpress.data.dataset.log import open_log
from recpress.data.dataset.writer import LogWriter
from recpress.data.negatives.samplers import UniformNegatives
from recpress.data.stream.batch import ITEM, USER, Batch, BatchBuilder
from recpress.data.stream.loader import InteractionStream
from recpress.modules.config import LossConfig, TablesConfig, TowersConfig, TwoTowerConfig
from recpress.modules.frozen.kernel import Storage, row_bytes
from recpress.modules.row_source import round_up
from recpress.modules.two_tower.model import SideSpec, TwoTower
from recpress.trainer.config import OptimizerConfig
from recpress.trainer.loop.config import FitConfig
from recpress.trainer.loop.fit import fit
from recpress.trainer.loop.optimizer import TrainOptimizer
from recpress.trainer.model.sharding import shard
from recpress.trainer.observability.metrics_log import MetricsLog

OURS, BARE, DENSE, SPARSE = "recpress", "bare TorchRec", "DDP, dense", "DDP, sparse"
LOOPS = {
    "trained": (OURS, BARE, DENSE, SPARSE),
    "frozen fp32": (OURS, BARE, DENSE),
    "frozen int8": (OURS, BARE),
    "hashed": (OURS, BARE, SPARSE),
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One model in one loop."""

    tables: str
    loop: str
    table_rows: int
    """Ids of users and items together."""
    dim: int
    batch: int
    """Rows of a rank's batch."""
    ranks: int
    share: float
    """Rows of a hashed table, as a share of the ids; 1 for the others."""

    negatives: int
    """Of each row."""
    rate: float | None = None
    """Of the sample of a log that the batches are read from; None: they are in memory."""

    @property
    def items(self) -> int:
        """A fifth of the ids."""
        return self.table_rows // 5

    @property
    def users(self) -> int:
        return self.table_rows - self.items

    @property
    def sides(self) -> tuple[int, int]:
        return self.users, self.items

    @property
    def frozen(self) -> bool:
        return "frozen" in self.tables

    @property
    def hashed(self) -> bool:
        return self.tables.startswith("hashed")

    @property
    def storage(self) -> Storage:
        return "int8" if self.tables.endswith("int8") else "fp32"

    @property
    def table_bytes(self) -> int:
        """Of all tables as they are stored, with the maps."""
        rows = sum(max(1, round(self.share * ids)) for ids in self.sides)
        maps = 4 * self.table_rows if self.hashed else 0
        return rows * row_bytes(self.storage, round_up(self.dim)) + maps


class RandomFactors:
    """Random rows, drawn when they are read; without memory."""

    def __init__(self, rows: int, dim: int) -> None:
        self.shape = (rows, dim)

    def __getitem__(self, index: Any) -> np.ndarray:
        rows, columns = index if isinstance(index, tuple) else (index, slice(None))
        shape = (len(range(*rows.indices(self.shape[0]))),) if isinstance(rows, slice) else np.shape(rows)
        width = len(range(*columns.indices(self.shape[1])))
        return np.random.default_rng(0).normal(0, 0.3, (*shape, width)).astype(np.float32)


def random_batch(sizes: Any, seed: int, device: torch.device) -> Batch:
    """Skewed ids of users and positive items, uniform negatives.

    Args:
        sizes: has `users`, `items`, `batch` (rows) and `negatives` (of a row).
    """
    rng = np.random.default_rng(seed)
    negatives = torch.from_numpy(rng.integers(0, sizes.items, sizes.batch * sizes.negatives))
    users, positives = (torch.from_numpy(skewed_ids(rng, ids, sizes.batch)) for ids in (sizes.users, sizes.items))
    items = torch.cat([positives, negatives])
    return Batch(
        keyed(users, [USER]),
        keyed(items, [ITEM]),
        torch.ones(sizes.batch),
        torch.full((len(items),), -float(np.log(sizes.items))),
    ).to(device)


def make_log(folder: Path, case: Case, rows: int) -> None:
    """A log of such ids, in row groups small enough that its rows are shuffled as those of a long log are."""
    rng = np.random.default_rng(0)
    with LogWriter(folder, LayoutConfig(row_group_rows=max(1, rows // 32))) as writer:
        ids = {
            f"{side}_id": skewed_ids(rng, number, rows) for side, number in zip((USER, ITEM), case.sides, strict=True)
        }
        writer.part("train").write(pa.table(ids))


class LogBatches:
    """The batches of a sample of a log, read and built during training; each pass is the next epoch."""

    def __init__(self, folder: str, case: Case, rank: int, device: torch.device) -> None:
        assert case.rate is not None
        log = open_log(folder)
        config, sample = StreamConfig(batch_size=case.batch), SampleConfig(rate=case.rate)
        self.stream = InteractionStream(log.train, log.schema, config, rank=rank, world=case.ranks, sample=sample)
        self._build = BatchBuilder(UniformNegatives(case.items, case.negatives), device=device)

    @property
    def rows(self) -> int:
        """Of one pass, on all ranks together."""
        return self.stream.num_rows

    def __iter__(self) -> Iterator[Batch]:
        yield from map(self._build, self.stream)
        self.stream.set_epoch(self.stream.epoch + 1)


def side(key: str, ids: int, case: Case) -> SideSpec:
    """Users or items, with a map if they are hashed."""
    id_map = random_map(ids, max(1, round(case.share * ids)), 2) if case.hashed else None
    return SideSpec(key=key, rows=ids, dim=case.dim if case.frozen else None, map=id_map)


def bare_loop(model: torch.nn.Module, optimizer: TrainOptimizer, batches: Iterable[Batch]) -> None:
    """zero_grad, forward, backward, step, and nothing else."""
    model.train()
    for batch in batches:
        optimizer.zero_grad()
        loss, _ = model(batch)
        loss.backward()
        optimizer.step()


def our_loop(
    model: DistributedModelParallel, optimizer: TrainOptimizer, batches: Iterable[Batch], device: torch.device
) -> None:
    """The loop of `recpress train`: TorchRec's pipeline, losses read, a log."""
    with tempfile.TemporaryDirectory() as folder, MetricsLog(folder) as log:
        fit(
            model,
            optimizer,
            lambda epoch, first: batches,
            FitConfig(epochs=1),
            device=device,
            log=log,
            show_progress=False,
        )


class Subject:
    """The model of a case, and its loop."""

    def __init__(self, case: Case, hidden: tuple[int, ...], device: torch.device) -> None:
        torch.manual_seed(0)
        self.case, self.device, frozen = case, device, case.frozen
        config = TwoTowerConfig(
            tables=TablesConfig(
                strategy="frozen" if frozen else "random", dim=round_up(case.dim), storage=case.storage
            ),
            towers=TowersConfig(kind="residual", hidden=hidden),
            loss=LossConfig(kind="bce"),
        )
        user, item = side(USER, case.sides[0], case), side(ITEM, case.sides[1], case)
        if case.loop in (DENSE, SPARSE):
            self.plain = PlainTwoTower(
                config, user, item, OptimizerConfig(), device, frozen=frozen, sparse=case.loop == SPARSE
            )
            return
        model = TwoTower(config, user, item, tables_device="meta")
        self.model = shard(model, device, batch_size=case.batch)
        if frozen:
            factors = (RandomFactors(ids, case.dim) for ids in case.sides)
            rows = [RandomFactors(s.map.num_rows, case.dim) if s.map else None for s in (user, item)]
            self.model.module.load_factors(*factors, rows=rows)
        self.optimizer = TrainOptimizer(self.model, OptimizerConfig(), 0)

    def close(self) -> None:
        """Let go of the model, before the process group ends.

        Else DDP's reducer is the last that holds the group, whose destructor then runs with the GIL and waits for
        gloo's threads, of which one may wait for the GIL to let go of a tensor: a deadlock, once in some 200 cases.
        """
        self.__dict__.clear()
        gc.collect()

    def train(self, batches: Iterable[Batch], loop: str | None = None) -> None:
        """One pass, in the loop of the case or another one for the same model."""
        loop = loop or self.case.loop
        if loop == OURS:
            our_loop(self.model, self.optimizer, batches, self.device)
        elif loop == BARE:
            bare_loop(self.model, self.optimizer, batches)
        else:
            self.plain.train(batches)
