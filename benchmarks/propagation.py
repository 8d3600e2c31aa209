"""How much of what shared rows lose does the propagation of LightGCN give back, without any training of its own?

Takes 20 s small, 1 minute full, alone on two cores.

    python benchmarks/propagation.py                                            # a synthetic log
    python benchmarks/propagation.py --data runs/beauty --share 0.23988 --factors 64

Each method maps ids onto the same number of rows, and the rows are trained by weighted least squares (one sweep), as in
`recpress compare hash`. Then the vectors are ranked twice: as they are, and averaged with their neighbors in the graph
of train examples (0 to 2 steps), as LightGCN does. Settings of the methods are their first ones; nothing is chosen.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

from recpress.benchmarks.common import arguments, bars, installed, publish, settings_of
from recpress.data.config import SynthConfig
from recpress.modules.config import ALSConfig
from recpress.modules.hashing.methods import JOINT_METHODS
from recpress.trainer.compare.config import CompareHashConfig
from recpress.trainer.compare.hash_backbone import Backbone, Vectors
from recpress.trainer.compare.hash_settings import NAMES, search_axes, setting_of
from recpress.trainer.compare.light_gcn import Propagation

SMALL = ("--users", "1000", "--items", "600", "--rows", "40000", "--factors", "16")

METRICS = ("Recall@10", "NDCG@10")


def main(argv: list[str] | None = None) -> None:
    parser = arguments(__doc__)
    parser.add_argument("--data", help="log with val and test rows; default: a synthetic log")
    parser.add_argument("--methods", nargs="+", default=["louvain", "co-cluster", "learned", "learned-2"])
    parser.add_argument("--share", type=float, default=0.2, help="rows of the budget, as a share of the ids")
    parser.add_argument("--factors", type=int, default=64)
    parser.add_argument("--steps", type=int, default=2, help="steps of propagation")
    parser.add_argument("--seed", type=int, default=0)
    for name, default in (("users", 4000), ("items", 2000), ("rows", 200_000)):
        parser.add_argument(f"--{name}", type=int, default=default, help="of the synthetic log")
    args = parser.parse_args(argv)
    methods = args.methods
    if not installed("sknetwork") and (graph := [name for name in methods if name in JOINT_METHODS]):
        print(f"left out: {', '.join(graph)}; they need scikit-network, pip install 'recpress[graph]'")
        methods = [name for name in methods if name not in JOINT_METHODS]
    with tempfile.TemporaryDirectory() as folder:
        config = CompareHashConfig(
            data=args.data,
            synth=SynthConfig(users=args.users, items=args.items, rows=args.rows),
            share=args.share,
            als=ALSConfig(factors=args.factors),
        )
        rows = measured(Backbone(config, Path(folder)), methods, args.steps, args.seed)
    publish(
        "Shared rows as they are, and propagated over the graph of train examples",
        rows,
        out=args.out,
        settings=settings_of(vars(args), ("out", "data")),
        plots=[bars([METRICS[0], f"{METRICS[0]} propagated"], ["method"], title="Propagation without training")],
    )


def measured(backbone: Backbone, methods: list[str], steps: int, seed: int) -> list[dict[str, str | float]]:
    """A row for the full table and each method."""
    full, _ = backbone.factorize(seed)
    propagate = Propagation(backbone.train, backbone.log.num_users, backbone.log.num_items, steps)
    kept = {"Full table": Vectors(full.users.float(), full.items.float())}
    for method in methods:
        setting = setting_of(
            backbone.config, method, {axis: of[0] for axis, of in search_axes(backbone.config, method).items()}
        )
        maps, _ = backbone.make_maps(setting, full, backbone.budget)
        kept[NAMES[method][0]], _ = backbone.fit(setting, maps, full, lambda _: None)
    rows: list[dict[str, str | float]] = []
    for name, vectors in kept.items():
        users, items = propagate(torch.cat(vectors)).split([len(vectors.users), len(vectors.items)])
        plain, _ = backbone.test_metrics(*vectors)
        propagated, _ = backbone.test_metrics(users, items)
        row: dict[str, str | float] = {"method": name}
        for metric in METRICS:
            row |= {metric: plain[metric], f"{metric} propagated": propagated[metric]}
        top = rows[0] if rows else row
        row["of full, %"] = 100 * plain[METRICS[0]] / float(top[METRICS[0]])
        row["of full propagated, %"] = 100 * propagated[METRICS[0]] / float(top[METRICS[0]])
        rows.append(row)
    return rows


if __name__ == "__main__":
    main()
