"""A result of `compare cadc` that the tests share."""

from recpress.trainer.compare.cadc_result import CadcResult, CurvePoint, MethodResult, SeedResult, SweepPoint

HOSTILE = "<script>alert('x')</script> & \"quotes\""


def method(key, values, seconds, rows=None, curve=(), description="What it does."):
    seeds = tuple(
        SeedResult(seed=n, metrics={"HR@10": v + 0.2, "NDCG@10": v}, seconds=seconds) for n, v in enumerate(values)
    )
    return MethodResult(
        key=key,
        name=f"{key} 10 %",
        description=description,
        seeds=seeds,
        rows=rows,
        table_bytes=1_500_000 if rows else None,
        curve=curve,
    )


def points(*pairs):
    return tuple(CurvePoint(seconds=s, epoch=n, metrics={"NDCG@10": v}) for n, (s, v) in enumerate(pairs))


def cadc_result():
    slow = points((1, 0.02), (60, 0.40), (110, 0.42), (120, 0.41))
    fast = points((9, 0.41), (11, 0.43))
    return CadcResult(
        title=HOSTILE,
        methods=(
            method("popularity", [0.25], {}),
            method("mf", [0.44, 0.45], {"factorize": 6.0}),
            method("random", [0.40, 0.41], {"train": 120.0}, 1000, slow),
            method("cadc", [0.45, 0.47], {"factorize": 6.0, "train": 4.0}, 100, fast, HOSTILE),
        ),
        ours="cadc",
        reference="random",
        factorization="mf",
        total_rows=1000,
        sweeps=tuple(SweepPoint(sweep=n, objective=100.0 / n, seconds=n) for n in (1, 2, 3)),
        data={"Log": HOSTILE, "Users": 6040},
        notes=(HOSTILE,),
        warnings=(HOSTILE,),
        config={"name": HOSTILE},
        versions={"torch": HOSTILE},
        command=f"recpress compare cadc --data {HOSTILE}",
    )
