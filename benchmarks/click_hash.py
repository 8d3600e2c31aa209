"""How good is a click model with fewer bytes of tables, by each method? MovieLens-1M as a click log, or another log.

    python benchmarks/click_hash.py --ratings $DATA/ml-1m --shares 0.25 0.1 0.0333 --seeds 0 1 2 --out click_hash.json

`recpress compare hash --backbone dlrm` for each share, at equal bytes: the budget is that share of the bytes of the
full tables, with maps. The log of MovieLens is that of `click_log.py`; `--data` takes another log, all of whose columns
are features. With `--folder`, shares that are finished are read from there.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from recpress.benchmarks.click_log import click_log
from recpress.benchmarks.common import arguments, lines, publish, settings_of
from recpress.data.config import Schema
from recpress.trainer.compare.config import CLICK_METHODS, ClickConfig, CompareHashConfig
from recpress.trainer.compare.hash import compare_hash
from recpress.trainer.features.config import FeatureConfig
from recpress.trainer.model.config import DCNConfig
from recpress.trainer.observability.logging_setup import logging_to_stderr

NEEDS = "MovieLens-1M as Parquet files (--ratings), or a log of clicks (--data)"
FEATURES = ("user_id", "item_id", "gender", "age", "occupation", "genres", "year")


def run(config: CompareHashConfig) -> None:
    """The comparison, with its progress as log lines."""
    with logging_to_stderr("click_hash"):
        compare_hash(config)


def row(share: float, full: dict[str, Any], method: dict[str, Any]) -> dict[str, Any]:
    """One row of the table."""

    def mean(metric: str) -> float:
        return sum(found[metric] for found in method["metrics"]) / len(method["metrics"])

    aucs = [found["AUC"] for found in method["metrics"]]
    return {
        "share of bytes": share,
        "method": method["key"],
        "place": method["place"] or "",
        "AUC": mean("AUC"),
        "spread of AUC": max(aucs) - min(aucs),
        "level with full": method["level_with_full"],
        "LogLoss": mean("LogLoss"),
        "NE": mean("NE"),
        "rows": method["rows"],
        "bytes": method["bytes"],
        "of full bytes": method["bytes"] / full["bytes"],
        "map bytes": method["map_bytes"],
        "trials": method["trials"],
        "setting": ", ".join(f"{name} {value}" for name, value in method["setting"].items()),
    }


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--ratings", help="folder of ratings.parquet, users.parquet and items.parquet")
    parser.add_argument("--data", help="a log with a column `label`, in place of --ratings")
    parser.add_argument("--folder", help="folder of the comparisons; default: a temporary one")
    parser.add_argument("--shares", nargs="+", type=float, default=[0.25, 0.1, 0.0333])
    parser.add_argument("--methods", nargs="+", default=CLICK_METHODS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--trials", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--table-learning-rate", type=float, default=0.15)
    parser.add_argument("--layers", nargs="+", type=int, default=[64, 32], help="of the network on the interactions")
    args = parser.parse_args()
    if bool(args.ratings) == bool(args.data):
        parser.error("expected one of --ratings and --data")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(args.folder or temporary)
        log = Path(args.data) if args.data else folder / "log"
        if args.ratings and not log.exists():
            click_log(args.ratings, log)
        rows = []
        for share in args.shares:
            out = folder / f"share-{share}"
            if not (out / "result.json").exists():
                run(
                    CompareHashConfig(
                        data=str(log),
                        out=str(out),
                        schema=Schema(label="label") if args.ratings else Schema(),
                        backbone="dlrm",
                        features={name: FeatureConfig() for name in FEATURES} if args.ratings else {},
                        methods=tuple(args.methods),
                        seeds=tuple(args.seeds),
                        trials=args.trials,
                        share=share,
                        equal_rows=False,
                        click=ClickConfig(
                            network=DCNConfig(dense_layers=(16,), over_layers=tuple(args.layers)),
                            epochs=args.epochs,
                            batch_size=args.batch,
                            learning_rate=args.learning_rate,
                            table_learning_rate=args.table_learning_rate,
                        ),
                    )
                )
            found = json.loads((out / "result.json").read_text(encoding="utf-8"))["bytes"]["methods"]
            full = next(method for method in found if method["key"] == "full")
            others = sorted((row(share, full, m) for m in found if m is not full), key=lambda r: -r["AUC"])
            rows += [row(share, full, full), *others]
    publish(
        "A DLRM of clicks with fewer bytes of tables",
        rows,
        out=args.out,
        settings=settings_of(vars(args), leave_out=("out", "folder", "ratings", "data")),
        plots=[lines(["share of bytes"], ["AUC"], ["method"], title="Means over seeds")],
    )


if __name__ == "__main__":
    main()
