"""Which settings of ALS rank best, on a validation part of train?

    python benchmarks/choose_als.py --data LOG

One random row of each user is held out of train, with 99 negatives that the user never met; the test rows are not
touched. Settings are drawn at random (uniform in the logarithm), so that a rerun with another seed tests the choice.
"""

import argparse
import math
import random
import tempfile
import time
from dataclasses import asdict

import torch
from recpress.benchmarks.common import publish, settings_of
from recpress.data.holdout import leave_one_out
from recpress.data.log import iter_columns, open_log
from recpress.modules.als import ALS
from recpress.modules.config import ALSConfig
from recpress.trainer.config import EvaluationConfig
from recpress.trainer.evaluate.ranking import vectors_from_factors
from recpress.trainer.evaluate.stage import load_heldout, rank_heldout

SMALL = ("--trials", "5", "--factors", "32")
NEEDS = "a log: -- --data LOG"


def draw(rng: random.Random, args: argparse.Namespace) -> ALSConfig:
    """Settings with confidence 1: the scale of the loss is free, so the other weights are relative to it."""

    def between(low: float, high: float) -> float:
        return round(math.exp(rng.uniform(math.log(low), math.log(high))), 5)

    unobserved = between(*args.unobserved)
    exponent = rng.choice(args.exponents)
    # regularization of a row of average weight, so that all exponents are searched over the same strengths
    average = (args.rows / args.users + unobserved * args.items + args.rows / args.items + unobserved * args.users) / 2
    return ALSConfig(
        factors=rng.choice(args.factors),
        sweeps=args.sweeps,
        confidence=1.0,
        unobserved_weight=unobserved,
        frequency_exponent=exponent,
        regularization=between(*args.regularization) / average**exponent,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="a log")
    parser.add_argument("--trials", type=int, default=30)
    parser.add_argument("--factors", type=int, nargs="+", default=[128, 192])
    parser.add_argument("--sweeps", type=int, default=12)
    parser.add_argument("--unobserved", type=float, nargs=2, default=[0.01, 0.5], help="range of unobserved_weight")
    parser.add_argument("--regularization", type=float, nargs=2, default=[1.0, 60.0], help="range, average row")
    parser.add_argument("--exponents", type=float, nargs="+", default=[0.0, 0.5, 1.0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", help="JSON file")
    args = parser.parse_args()
    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        log = open_log(leave_one_out(open_log(args.data), f"{folder}/log", by="random", seed=args.seed))
        heldout = load_heldout(log, EvaluationConfig())
        chunks = list(iter_columns(log.train, [log.schema.user, log.schema.item]))
        args.users, args.items, args.rows = log.num_users, log.num_items, log.train.num_rows
        found = []
        for trial in range(args.trials):
            config = draw(rng, args)
            model = ALS(config, log.num_users, log.num_items)
            for data in chunks:
                model.add(data[log.schema.user], data[log.schema.item])
            began = time.perf_counter()
            factors = model.fit()
            seconds = time.perf_counter() - began
            vectors = vectors_from_factors(factors.users), vectors_from_factors(factors.items)
            metrics = rank_heldout(heldout, *vectors, EvaluationConfig(), torch.device("cpu"))
            found.append({**asdict(config), "seconds": seconds, **metrics})
            print(f"{trial + 1:3} NDCG@10 {metrics['NDCG@10']:.4f} HR@10 {metrics['HR@10']:.4f} {config}", flush=True)
    found.sort(key=lambda row: -row["NDCG@10"])
    columns = ["NDCG@10", "HR@10", "factors", "unobserved_weight", "regularization", "frequency_exponent", "seconds"]
    publish(
        "Settings of ALS, best first",
        [{name: row[name] for name in columns} for row in found],
        out=args.out,
        settings=settings_of(vars(args), leave_out=("out", "data")),
    )


if __name__ == "__main__":
    main()
