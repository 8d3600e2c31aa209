"""How many ids per second does a map replace by rows, compared with modulo and TorchRec's collision module?

Takes 10 s small, 2 minutes full (estimated), alone on two cores.

    python benchmarks/remap.py --out remap.json

Ids per second of `LearnedHash` on a batch of one feature (or of 26), and of `MappedHash` (memory-mapped, on the host),
against `torch.remainder` on the same tensor and TorchRec's sorted collision module in evaluation mode, whose table has
`--mch-ids` of the ids. Ids are uniform, which no log is, or skewed (1 / rank) with the frequent ones spread over the
map. Runs are interleaved; ratios are medians of neighbors in time. The cost of a map in a training step is that of
zero_grad, forward, backward, step of a DLRM with an EmbeddingBagCollection of the compressed size.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, JaggedTensor, KeyedJaggedTensor
from torchrec.models.dlrm import DLRM, DLRMTrain
from torchrec.modules.mc_modules import LFU_EvictionPolicy, MCHManagedCollisionModule

from recpress.benchmarks.common import arguments, bars, publish, settings_of
from recpress.benchmarks.synthetic_logs import keyed, random_ids, random_map
from recpress.modules.compression.replace import compress
from recpress.modules.hashing.id_map import IdMap
from recpress.modules.hashing.learned_hash import LearnedHash
from recpress.modules.hashing.mapped_hash import MappedHash

SMALL = (
    "--map-ids", "1000000", "--ids", "200000", "--runs", "7", "--step-ids", "100000", "--batch", "2048",
    "--step-runs", "5",
)  # fmt: skip

FEATURES = 26


KEYS = [f"f{k}" for k in range(FEATURES)]


def filled_mch(ids: torch.Tensor, slots: int) -> MCHManagedCollisionModule:
    """TorchRec's sorted module in evaluation mode, its table full of ids."""
    module = MCHManagedCollisionModule(
        zch_size=slots,
        device=ids.device,
        eviction_policy=LFU_EvictionPolicy(),
        eviction_interval=1,
        input_hash_size=2**62,
    )
    inside = ids[torch.randperm(len(ids), device=ids.device)[: slots - 1]].sort().values
    module._mch_sorted_raw_ids[: slots - 1] = inside
    return module.eval()


def interleaved(jobs: dict[str, Callable[[], object]], runs: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of each run of each job, after one that warms up; on a CPU of its time, which others do not take."""
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    found: dict[str, list[float]] = {name: [] for name in jobs}
    for run in range(runs + 1):
        for name, job in jobs.items() if run % 2 else reversed(jobs.items()):
            if device.type == "cuda":
                torch.cuda.synchronize()
            start = clock()
            job()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if run:
                found[name].append(clock() - start)
    return found


def ratio(these: list[float], those: list[float]) -> float:
    return round(statistics.median(b / a for a, b in zip(these, those, strict=True)), 3)


@torch.no_grad()
def lookups(args: argparse.Namespace, size: int, kind: str, device: torch.device) -> list[dict[str, Any]]:
    """A row of the table for each way of making rows of ids."""
    rows = size // 10
    id_map = random_map(size, rows, 1)
    ids = random_ids(kind, size, args.ids, 2).to(device)
    per_key = size // FEATURES
    maps = {f"f{i}": random_map(per_key, max(1, per_key // 10), i) for i in range(FEATURES)}
    many = keyed(ids.remainder(per_key), KEYS)
    one = keyed(ids, ["f0"])
    plain, packed = (LearnedHash({"f0": id_map}, packed=p).to(device) for p in (False, True))
    for_many = LearnedHash(maps).to(device)
    some_unknown = keyed(torch.where(torch.rand(len(ids), device=device) < 0.01, ids + size, ids), ["f0"])
    two = LearnedHash({"f0": random_map(size, rows, 1, rows_per_id=2)}).to(device)
    slots = min(args.mch_ids, size)
    mch = filled_mch(torch.arange(size, device=device), slots)
    jagged = {"t": JaggedTensor(values=ids, lengths=torch.ones_like(ids))}
    with tempfile.TemporaryDirectory() as folder:
        id_map.save(folder)
        mapped = MappedHash({"f0": folder})
        host = ids.cpu()
        jobs = {
            "torch.remainder": lambda: torch.remainder(ids, rows),
            "LearnedHash": lambda: plain(one),
            "LearnedHash, 26 features": lambda: for_many(many),
            "LearnedHash, 1 % unknown": lambda: plain(some_unknown),
            "LearnedHash, two rows per id": lambda: two(one),
            "LearnedHash, packed": lambda: packed(one),
            "MappedHash, host": lambda: mapped.rows("f0", host),
            "TorchRec MCH, eval": lambda: mch(jagged),
        }
        seconds = interleaved(jobs, args.runs, device)
    return [
        {
            "what": name,
            "ids of the map": size,
            "ids": kind,
            "M ids/s": args.ids / statistics.median(found) / 1e6,
            "x torch.remainder": ratio(found, seconds["torch.remainder"]),
            "x TorchRec MCH": ratio(found, seconds["TorchRec MCH, eval"]),
        }
        for name, found in seconds.items()
    ]


class Hashed(nn.Module):
    """A training model behind a hash."""

    def __init__(self, hashes: nn.Module, model: nn.Module) -> None:
        super().__init__()
        self.hashes, self.model = hashes, model

    def forward(self, features: KeyedJaggedTensor, dense: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        loss, _ = self.model(Batch(dense, self.hashes(features), label))
        return loss


class Batch:
    """What DLRMTrain reads of a batch."""

    def __init__(self, dense: torch.Tensor, sparse: KeyedJaggedTensor, labels: torch.Tensor) -> None:
        self.dense_features, self.sparse_features, self.labels = dense, sparse, labels


def compressed(model: Any, maps: dict[str, IdMap]) -> nn.Module:
    """The model as `compress` makes it, from full tables that are never allocated, with the rows of `model`."""
    small = model.model.sparse_arch.embedding_bag_collection
    full = [
        dataclasses.replace(config, num_embeddings=maps[config.feature_names[0]].num_ids)
        for config in small.embedding_bag_configs()
    ]
    tables = EmbeddingBagCollection(full, device=torch.device("meta"))
    new: Any = compress(tables, {config.name: maps[config.feature_names[0]] for config in full}, warm_start=False)[0]
    new.trainable.to_empty(device=small.device)
    new.load_state_dict(small.state_dict(), strict=False)
    new.hashes.to(small.device)
    for bag in new.embedding_bags.values():
        bag.sparse = True
    found = copy.deepcopy(model)
    found.model.sparse_arch.embedding_bag_collection = new
    return found


def training_step(args: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """The same tables and rows with and without the hash: without it, the ids are rows already."""
    size = args.step_ids
    maps = {f"f{i}": random_map(size, size // 10, i) for i in range(FEATURES)}
    tables = [
        EmbeddingBagConfig(name=f"t{i}", num_embeddings=size // 10, embedding_dim=args.dim, feature_names=[f"f{i}"])
        for i in range(FEATURES)
    ]
    model = DLRMTrain(
        DLRM(
            EmbeddingBagCollection(tables, device=device),
            dense_in_features=13,
            dense_arch_layer_sizes=[512, 256, args.dim],
            over_arch_layer_sizes=[512, 512, 256, 1],
            dense_device=device,
        )
    )
    for bag in model.model.sparse_arch.embedding_bag_collection.embedding_bags.values():
        bag.sparse = True  # as TorchRec's fused tables, a step touches the rows of its batch alone
    hashes = LearnedHash(maps).to(device)
    subjects = {
        "plain": Hashed(nn.Identity(), copy.deepcopy(model)),
        "LearnedHash": Hashed(hashes, model),
        "compress": Hashed(nn.Identity(), compressed(model, maps)),
    }
    ids = torch.cat([random_ids("skewed", size, args.batch, 10 + i) for i in range(FEATURES)]).to(device)
    features = {name: keyed(ids, KEYS) for name in subjects} | {"plain": hashes(keyed(ids, KEYS))}
    dense = torch.randn(args.batch, 13, device=device)
    label = torch.randint(2, (args.batch,), device=device)

    def step(name: str, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        subjects[name](features[name], dense, label).backward()
        optimizer.step()

    optimizers = {name: torch.optim.SGD(subject.parameters(), lr=0.01) for name, subject in subjects.items()}
    jobs: dict[str, Callable[[], object]] = {name: partial(step, name, optimizers[name]) for name in subjects}
    jobs["hash alone"] = lambda: hashes(features["LearnedHash"])
    seconds = interleaved(jobs, args.step_runs, device)
    return [
        {
            "what": f"DLRM step: {name}",
            "ids of the map": FEATURES * size,
            "ids": "skewed",
            "ms": 1e3 * statistics.median(found),
            "ms / step without": statistics.median(a / b for a, b in zip(found, seconds["plain"], strict=True)),
        }
        for name, found in seconds.items()
    ]


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--ids", type=int, default=1_000_000, help="of one call")
    parser.add_argument("--map-ids", type=int, nargs="*", default=[1_000_000, 10_000_000])
    parser.add_argument("--mch-ids", type=int, default=1_000_000, help="slots of TorchRec's module, at most")
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--batch", type=int, default=4096, help="rows of a training step")
    parser.add_argument("--step-ids", type=int, default=1_000_000, help="ids of each of the 26 maps of a step")
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--step-runs", type=int, default=30)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    device = torch.device(args.device)
    rows = [row for size in args.map_ids for kind in ("uniform", "skewed") for row in lookups(args, size, kind, device)]
    publish(
        "Applying a map: ids per second, compared with modulo and TorchRec's collision module",
        rows + training_step(args, device),
        out=args.out,
        settings=settings_of(vars(args)) | {"threads": torch.get_num_threads()},
        device=device,
        plots=[
            bars(["M ids/s"], ["what"], title=f"Map of {size:,} ids, ids that fall off",
                 only={"ids": ["skewed"], "ids of the map": [size]})
            for size in args.map_ids
        ],
    )  # fmt: skip


if __name__ == "__main__":
    main()
