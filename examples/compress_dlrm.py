"""Train a DLRM on a Criteo log, compress its tables, and continue training.

python examples/compress_dlrm.py runs/criteo/train    # columns label, I1 to I13, C1 to C26
Only the end of `main` uses recpress. The rest is a common TorchRec model and loop.
"""

import argparse

import numpy as np
import pyarrow.parquet as pq
import torch
from torch.nn.functional import binary_cross_entropy_with_logits
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor
from torchrec.models.dlrm import DLRM, DLRM_DCN

from recpress.modules import HashConfig, TableStats, build_map, compress

DENSE, SPARSE, DIM = [f"I{i}" for i in range(1, 14)], [f"C{i}" for i in range(1, 27)], 16


def read(path: str) -> tuple[list[torch.Tensor], dict[str, int]]:
    """[dense (N, 13), ids (N, 26) numbered from 0 per column, labels (N,)], column -> its number of ids."""
    log = pq.read_table(path, columns=["label", *DENSE, *SPARSE])
    dense = np.stack([np.log1p(np.maximum(np.nan_to_num(log[c].fill_null(0).to_numpy()), 0)) for c in DENSE], 1)
    ids = [np.unique(log[c].fill_null(-1).to_numpy(), return_inverse=True) for c in SPARSE]
    columns = [dense.astype(np.float32), np.stack([number for _, number in ids], 1), log["label"].to_numpy()]
    return [torch.from_numpy(column) for column in columns], {
        c: len(values) for c, (values, _) in zip(SPARSE, ids, strict=True)
    }


def loss(model: torch.nn.Module, dense: torch.Tensor, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    features = KeyedJaggedTensor(keys=SPARSE, values=ids.T.reshape(-1), lengths=torch.ones(ids.numel()).int())
    return binary_cross_entropy_with_logits(model(dense, features).squeeze(1), labels.float())


def train(model: torch.nn.Module, log: tuple[torch.Tensor, ...]) -> None:
    optimizer = torch.optim.Adagrad(model.parameters(), lr=0.02)
    for batch in zip(*(column.split(256) for column in log), strict=True):
        optimizer.zero_grad()
        loss(model, *batch).backward()
        optimizer.step()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("log", help="Parquet file")
    parser.add_argument("--keep", type=float, default=0.1, help="share of the rows of each table of 100 rows or more")
    parser.add_argument("--dcn", action="store_true", help="DLRM_DCN instead of DLRM")
    args = parser.parse_args()
    log, sizes = read(args.log)
    parts = [4 * len(log[0]) // 10] * 2
    first, second, held_out = zip(*(c.split([*parts, len(c) - sum(parts)]) for c in log), strict=True)
    tables = [EmbeddingBagConfig(name=c, num_embeddings=n, embedding_dim=DIM) for c, n in sizes.items()]
    torch.manual_seed(0)
    kind, more = (DLRM_DCN, {"dcn_num_layers": 2, "dcn_low_rank_dim": 16}) if args.dcn else (DLRM, {})
    collection = EmbeddingBagCollection(tables)
    model = kind(collection, 13, [64, DIM], [64, 1], **more)
    train(model, first)
    print(f"held-out log loss of the full tables:        {loss(model, *held_out):.4f}")

    maps, counts = {}, {}
    for i, (name, size) in enumerate(sizes.items()):
        if size >= 100:
            counts[name] = first[1][:, i].bincount(minlength=size)
            embedding = collection.embedding_bags[name].weight.detach()
            ids = TableStats(name=name, num_ids=size, counts=counts[name], embedding=embedding)
            maps[name] = build_map(ids, int(args.keep * size), HashConfig(method="learned"))
    model, report = compress(model, maps, counts=counts)
    print(f"compressed, rows are means of the old rows:  {loss(model, *held_out):.4f}")
    train(model, second)
    print(f"compressed, after more training:             {loss(model, *held_out):.4f}\n\n{report}")


if __name__ == "__main__":
    main()
