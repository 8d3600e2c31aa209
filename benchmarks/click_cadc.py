"""CADC for a click model: a DLRM on 10 % of MovieLens-1M with frozen factors, against random tables on all rows.

    python benchmarks/click_cadc.py --ratings $DATA/ml-1m --seeds 0 1 2 --out click_cadc.json

The log is that of `click_log.py`: ratings of 4 and 5 are clicks, a random 80/10/10 split, features of users and items.
Factors are the logistic factorization of the clicks of all train rows. The DLRM has tables of ids, gender, age,
occupation, genres and year. In the CADC runs, those of users and items are the frozen factors. The `val` part chooses
the epoch, the `test` part is measured once. Seconds are those of the processor, of all threads, with evaluations; those
of CADC include the factorization.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch

from recpress.benchmarks.click_log import click_log
from recpress.benchmarks.common import arguments, publish, settings_of
from recpress.data.config import SampleConfig, Schema, StreamConfig
from recpress.modules.als.factors import FactorTable
from recpress.modules.config import LogisticConfig
from recpress.trainer.config import OptimizerConfig
from recpress.trainer.evaluate.metrics import pointwise_auc
from recpress.trainer.factorize.config import FactorizeConfig
from recpress.trainer.factorize.stage import factorize
from recpress.trainer.features.config import FeatureConfig
from recpress.trainer.model.config import DLRMConfig
from recpress.trainer.train.config import HeldOutConfig, TrainModelConfig
from recpress.trainer.train.model_stage import train_model

NEEDS = "MovieLens-1M as Parquet files (--ratings)"
SCHEMA = Schema(label="label")
SIDE = ("gender", "age", "occupation", "genres", "year")


def features(factors: str | None) -> dict[str, FeatureConfig]:
    """Ids, with frozen factors if given, and the columns of the side tables."""
    ids = {name: FeatureConfig(frozen=factors) for name in ("user_id", "item_id")}
    return ids | {name: FeatureConfig() for name in SIDE}


def auc_of_factors(log: Path, folder: str, part: str) -> float:
    users, items = (torch.from_numpy(np.array(FactorTable(folder, side)[:])) for side in ("user", "item"))
    table = pq.read_table(log / f"{part}.parquet")
    user, item, label = (torch.from_numpy(table[name].to_numpy()) for name in ("user_id", "item_id", "label"))
    return pointwise_auc((users[user] * items[item]).sum(1), label.float())


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--ratings", required=True, help="folder of ratings.parquet, users.parquet and items.parquet")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--rate", type=float, default=0.1)
    parser.add_argument("--factors", type=int, default=30, help="without the two columns of the biases")
    parser.add_argument("--factor-epochs", type=int, default=5)
    parser.add_argument("--factor-learning-rate", type=float, default=0.1)
    parser.add_argument("--weight-decay", type=float, default=0.02, help="of the factorization")
    parser.add_argument("--dim", type=int, default=16, help="of random tables")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch", type=int, default=2048)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--table-learning-rate", type=float, default=0.05)
    parser.add_argument("--rows", type=int, default=0, help="first ratings only; 0: all")
    args = parser.parse_args()
    torch.set_num_threads(1)
    runs: dict[str, list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        log = click_log(args.ratings, Path(folder) / "log", rows=args.rows)
        for seed in args.seeds:
            factors = f"{folder}/factors-{seed}"
            begin = time.process_time()
            logistic = LogisticConfig(
                factors=args.factors,
                epochs=args.factor_epochs,
                learning_rate=args.factor_learning_rate,
                weight_decay=args.weight_decay,
                seed=seed,
            )
            factorize(
                FactorizeConfig(
                    data=str(log), out=factors, schema=SCHEMA, method="logistic", use_label=True, logistic=logistic
                )
            )
            factor_seconds = time.process_time() - begin
            runs.setdefault("factors alone", []).append(
                {"AUC": auc_of_factors(log, factors, "test"), "seconds": factor_seconds, "epoch": args.factor_epochs}
            )
            print(f"seed {seed}, factors alone: {runs['factors alone'][-1]}", flush=True)
            base = TrainModelConfig(
                data=str(log),
                out="",
                schema=SCHEMA,
                factory="dlrm",
                model=DLRMConfig(),
                epochs=args.epochs,
                seed=seed,
                stream=StreamConfig(batch_size=args.batch, seed=seed),
                evaluation=HeldOutConfig(metric="AUC", patience=1),
                optimizer=OptimizerConfig(
                    learning_rate=args.learning_rate, table_learning_rate=args.table_learning_rate
                ),
                tensorboard=False,
            )
            for name, frozen, rate in (
                (f"frozen factors, {args.rate:.0%} (CADC)", True, args.rate),
                (f"random tables, {args.rate:.0%}", False, args.rate),
                ("random tables, 100%", False, 1.0),
            ):
                config = replace(
                    base,
                    out=f"{folder}/{seed}-{frozen}-{rate}",
                    dim=-(-(args.factors + 2) // 4) * 4 if frozen else args.dim,
                    features=features(factors if frozen else None),
                    sample=SampleConfig(rate=rate, seed=seed),
                )
                begin = time.process_time()
                result = train_model(config)
                seconds = time.process_time() - begin + (factor_seconds if frozen else 0.0)
                found = {"AUC": result.metrics["AUC"], "NE": result.metrics["NE"], "LogLoss": result.metrics["LogLoss"]}
                assert result.fit.best is not None
                found |= {"val AUC": result.validation["AUC"], "seconds": seconds, "epoch": result.fit.best["epoch"]}
                runs.setdefault(name, []).append(found)
                print(f"seed {seed}, {name}: {found}", flush=True)

    def mean(found: list[dict[str, float]], key: str) -> Any:
        return statistics.mean(run[key] for run in found) if key in found[0] else ""

    publish(
        "A DLRM of clicks: frozen factors and 10 % of the rows against random tables and all rows",
        [
            {
                "run": name,
                "AUC": mean(found, "AUC"),
                "spread of AUC": max(r["AUC"] for r in found) - min(r["AUC"] for r in found),
                "NE": mean(found, "NE"),
                "log loss": mean(found, "LogLoss"),
                "best epoch": mean(found, "epoch"),
                "processor seconds": mean(found, "seconds"),
            }
            for name, found in runs.items()
        ],
        out=args.out,
        settings=settings_of(vars(args)),
    )


if __name__ == "__main__":
    main()
