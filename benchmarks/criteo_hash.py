"""How good is a DLRM with fewer table rows, by learned maps and by the hashing trick? A synthetic log like Criteo's.

Takes 15 s small, 12 minutes full (estimated), alone on two cores.

    python benchmarks/criteo_hash.py --rows 1000000 --ids 400000 --seeds 0 1 2 --out criteo_hash.json

One DLRM (TorchRec's, dimension 16, one pass, fused Adagrad), one log. The tables are full, or have a share of the rows
by a method and a split of the rows between the tables:

- `proportional`: in proportion to each table's ids, at least 1;
- `cap`: at most a common number of rows per table (the cap of facebookresearch/dlrm);
- `distortion`: `split_rows`, by the embedding of the warm-up and the counts.

The warm-up (`warm_up`) uses a sample of the train rows, the network all of them. AUC by ranks; normalized entropy is
the log loss over the entropy of the labels' mean (He et al. 2014), lower is better; bytes are those of tables and maps.
`planted` is the probability that the labels were drawn with, the best possible model.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torchrec.models.dlrm import DLRM
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.fused_embedding_modules import FusedEmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from recpress.benchmarks.common import arguments, lines, publish, settings_of
from recpress.data.config import SynthCriteoConfig
from recpress.data.dataset.log import open_log
from recpress.data.dataset.parquet_split import ParquetSplit
from recpress.data.ingest.formats import CATEGORIES, INTS
from recpress.data.sampling.scan import iter_columns
from recpress.data.synthetic.criteo import SyntheticCriteo, synth_criteo
from recpress.modules.config import HashConfig
from recpress.modules.hashing.budget import split_rows
from recpress.modules.hashing.methods import build_map
from recpress.modules.hashing.table_stats import TableStats
from recpress.modules.hashing.warm_up import warm_up
from recpress.trainer.evaluate.metrics import pointwise_auc

SMALL = ("--rows", "60000", "--test-rows", "20000", "--ids", "20000", "--shares", "0.05", "--seeds", "0")

DIM = 16
RUNS = (
    ("modulo", "proportional"),
    ("modulo", "cap"),
    ("frequency", "proportional"),
    ("frequency", "cap"),
    ("cluster", "distortion"),
    ("learned", "distortion"),
)


class Part(NamedTuple):
    """Rows of the log in memory: dense (n, 13) float32, ids (n, 26) int32, label (n,) float32."""

    dense: torch.Tensor
    ids: torch.Tensor
    label: torch.Tensor


def read(rows: ParquetSplit) -> Part:
    """The rows of a part; numbers as log(1 + x), a missing one 0."""
    read = list(iter_columns(rows, ["label", *INTS, *CATEGORIES]))
    columns = {name: np.concatenate([part[name] for part in read]) for name in read[0]}
    dense = np.log1p(np.nan_to_num(np.stack([columns[name] for name in INTS], 1)))
    ids = np.stack([columns[name] for name in CATEGORIES], 1)
    return Part(*(torch.from_numpy(x) for x in (dense, ids.astype(np.int32), columns["label"])))


def proportional(sizes: list[int], budget: int) -> list[int]:
    """In proportion to the ids, at least 1."""
    return [max(1, size * budget // sum(sizes)) for size in sizes]


def capped(sizes: list[int], budget: int) -> list[int]:
    """The smaller of the ids and a common cap, the largest that the budget allows."""
    low, high = 1, max(sizes)
    while low < high:
        cap = (low + high + 1) // 2
        low, high = (cap, high) if sum(min(size, cap) for size in sizes) <= budget else (low, cap - 1)
    return [min(size, low) for size in sizes]


def features(ids: torch.Tensor) -> KeyedJaggedTensor:
    """(B, 26) -> one id for each key and row."""
    lengths = torch.ones(ids.numel(), dtype=torch.int32)
    return KeyedJaggedTensor.from_lengths_sync(list(CATEGORIES), ids.T.reshape(-1).long(), lengths)


def train(sizes: list[int], train: Part, test: Part, seed: int, args: argparse.Namespace) -> dict[str, float]:
    """A DLRM by one pass over train, then its figures on test."""
    torch.manual_seed(seed)
    tables = [
        EmbeddingBagConfig(name=name, embedding_dim=DIM, num_embeddings=size, feature_names=[name])
        for name, size in zip(CATEGORIES, sizes, strict=True)
    ]
    fused = {"lr": args.table_learning_rate, "eps": 1e-8}
    collection = FusedEmbeddingBagCollection(tables, torch.optim.Adagrad, fused)
    for weight in collection.state_dict().values():
        weight.normal_(0, 0.01)
    model = DLRM(collection, len(INTS), [64, 32, DIM], [128, 64, 1])
    network = [parameter for name, parameter in model.named_parameters() if "embedding_bag" not in name]
    optimizer = torch.optim.Adam(network, lr=args.learning_rate)
    begin = time.perf_counter()
    for rows in torch.randperm(len(train.label)).split(args.batch):
        logits = model(train.dense[rows], features(train.ids[rows])).squeeze(1)
        loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, train.label[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    seconds = time.perf_counter() - begin
    parts = zip(test.dense.split(args.batch), test.ids.split(args.batch), strict=True)
    with torch.no_grad():
        scores = torch.cat([model(dense, features(ids)).squeeze(1) for dense, ids in parts])
    return figures(scores, test.label) | {"train_seconds": seconds}


def figures(logits: torch.Tensor, label: torch.Tensor) -> dict[str, float]:
    """AUC, ties by mean rank, and normalized entropy."""
    loss = torch.nn.functional.binary_cross_entropy_with_logits(logits.double(), label.double())
    base = label.double().mean()
    entropy = -(base * base.log() + (1 - base) * (1 - base).log())
    return {"auc": pointwise_auc(logits, label), "normalized_entropy": float(loss / entropy)}


def id_tables(train: Part, sizes: list[int], seed: int, args: argparse.Namespace) -> tuple[list[TableStats], float]:
    """Counts of all train rows, embeddings of a warm-up on a sample of them; and its seconds."""
    begin = time.perf_counter()
    order = torch.randperm(len(train.label), generator=torch.Generator().manual_seed(seed))
    sample = order[: int(args.sample * len(order))]
    batches = ((train.dense[rows], train.ids[rows], train.label[rows]) for rows in sample.split(2048))
    found = warm_up(batches, sizes, seed=seed, names=CATEGORIES)
    tables = [
        TableStats(name=name, num_ids=size, counts=torch.bincount(ids, minlength=size), embedding=embedding)
        for name, size, ids, embedding in zip(CATEGORIES, sizes, train.ids.T, found.embeddings, strict=True)
    ]
    return tables, time.perf_counter() - begin


def compressed(
    method: Any, split: str, budget: int, tables: list[TableStats], parts: tuple[Part, Part], seed: int,
    args: argparse.Namespace,
) -> dict[str, float]:  # fmt: skip
    """One method at one budget."""
    config = HashConfig(method=method, count_exponent=args.count_exponent, seed=seed)
    sizes = [table.num_ids for table in tables]
    begin = time.perf_counter()
    if split == "distortion":
        rows = split_rows(tables, budget, config)
    else:
        rows = {"proportional": proportional, "cap": capped}[split](sizes, budget)
    maps = [build_map(table, number, config) for table, number in zip(tables, rows, strict=True)]
    seconds = time.perf_counter() - begin
    mapped_train, mapped_test = (
        part._replace(ids=torch.stack([found.rows[of, 0] for found, of in zip(maps, part.ids.T, strict=True)], 1))
        for part in parts
    )
    return {
        **train(rows, mapped_train, mapped_test, seed, args),
        "rows": sum(rows),
        "table_bytes": 4 * DIM * sum(rows),
        "map_bytes": sum(found.nbytes for found in maps),
        "map_seconds": seconds,
    }


def row(method: str, split: str, share: float, runs: list[dict[str, float]]) -> dict[str, Any]:
    """One row of the table: means over seeds, and the spread from the lowest to the highest of them."""

    def of(key: str) -> list[float]:
        return [run.get(key, 0.0) for run in runs]

    return {
        "method": method,
        "split of the rows": split,
        "share of rows": share,
        "rows": round(statistics.mean(of("rows"))),
        "AUC": statistics.mean(of("auc")),
        "spread of AUC": max(of("auc")) - min(of("auc")),
        "normalized entropy": statistics.mean(of("normalized_entropy")),
        "tables MB": statistics.mean(of("table_bytes")) / 1e6,
        "maps MB": statistics.mean(of("map_bytes")) / 1e6,
        "map seconds": statistics.mean(of("map_seconds")),
    }


def main() -> None:
    """Make the log, run all, print the table, write the JSON."""
    parser = arguments(__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--test-rows", type=int, default=200_000)
    parser.add_argument("--ids", type=int, default=400_000)
    parser.add_argument("--shares", nargs="+", type=float, default=[0.01, 0.05, 0.25])
    parser.add_argument("--methods", nargs="+", default=["modulo", "frequency", "cluster", "learned"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--sample", type=float, default=0.3, help="share of the train rows that the warm-up sees")
    parser.add_argument("--count-exponent", type=float, default=0.5, help="an id weighs this power of its count")
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--table-learning-rate", type=float, default=0.05)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    config = SynthCriteoConfig(rows=args.rows, test_rows=args.test_rows, ids=args.ids)
    with tempfile.TemporaryDirectory() as folder:
        log = open_log(synth_criteo(config, Path(folder) / "log"), pairs=False)
        assert log.test is not None
        parts = read(log.train), read(log.test)
    made = SyntheticCriteo(config)
    sizes = list(made.sizes)
    planted = torch.from_numpy(made.probabilities("test", 0, args.test_rows)).logit()
    planted_figures = figures(planted, parts[1].label)
    results: dict[tuple[str, str, float], list[dict[str, float]]] = {("planted", "", 1.0): [planted_figures]}
    for seed in args.seeds:
        whole = {"rows": sum(sizes), "table_bytes": 4 * DIM * sum(sizes), "map_bytes": 0}
        results.setdefault(("full", "", 1.0), []).append(train(sizes, *parts, seed, args) | whole)
        tables, seconds = id_tables(parts[0], sizes, seed, args)
        print(f"seed {seed}: warm-up {seconds:.1f} s", flush=True)
        for share in args.shares:
            for method, split in (run for run in RUNS if run[0] in args.methods):
                run = compressed(method, split, int(share * sum(sizes)), tables, parts, seed, args)
                results.setdefault((method, split, share), []).append(run)
                print(f"seed {seed}, {share:.0%} of the rows, {method}, {split}: AUC {run['auc']:.4f}", flush=True)
    publish(
        "Fewer rows of 26 tables: AUC and normalized entropy of a DLRM",
        [row(*key, runs) for key, runs in results.items()],
        out=args.out,
        settings=settings_of(vars(args)),
        plots=[
            lines(["share of rows"], ["AUC", "normalized entropy"], ["method", "split of the rows"],
                  title="Means over seeds", only={"method": args.methods}),
        ],
    )  # fmt: skip


if __name__ == "__main__":
    main()
