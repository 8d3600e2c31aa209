"""`recpress factorize`: log -> factors, sharded over the ranks."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch.distributed as dist
from recpress.data.config import SampleConfig
from recpress.data.errors import InputError
from recpress.data.log import Log, iter_columns, open_log
from recpress.modules.als import ALS, SweepReport
from recpress.modules.factors import Factors
from recpress.trainer.artifacts import CROSSFIT, FACTORS, describe_log, shared_artifact
from recpress.trainer.config import FactorizeConfig, chosen_schema
from recpress.trainer.distributed import Ranks, agreed, process_group
from tqdm import tqdm


@dataclass
class FactorizeResult:
    """What a factorization took, and how its objective fell."""

    seconds: float
    """Reading the log and all sweeps, without cross-fitting and saving."""
    crossfit_seconds: float
    sweeps: list[tuple[float, float]] = field(default_factory=list)
    """Objective after each sweep (of `logistic`, mean loss of each epoch), and seconds since the first began."""


def factorize(config: FactorizeConfig) -> FactorizeResult:
    """Factorize the train rows of a log and write the factors to `config.out`.

    Raises:
        InputError: the log or the settings cannot be used; `out` exists. On every rank; nothing is written.
    """
    with process_group(config.device) as ranks:
        with agreed():
            log = open_log(config.data, chosen_schema(config.schema))
            if config.use_label and not log.schema.label:
                raise InputError(
                    "--use-label: expected --schema.label, the column that scales the confidence"
                )
        crossfit = (
            SampleConfig(rate=config.crossfit_rate, seed=config.crossfit_seed)
            if config.crossfit_rate
            else None
        )
        meta: dict[str, Any] = {
            "log": describe_log(log),
            "config": asdict(config),
            "crossfit": None if crossfit is None else asdict(crossfit),
        }
        with shared_artifact(config.out, FACTORS, meta, overwrite=config.overwrite) as tmp:
            begin = time.monotonic()
            factors, sweeps = _fit(config, log, ranks)
            result = FactorizeResult(time.monotonic() - begin, 0.0, sweeps)
            factors.save(tmp)
            if crossfit is not None:
                begin = time.monotonic()
                if ranks.rank == 0:
                    (tmp / CROSSFIT).mkdir()
                dist.barrier()
                without, _ = _fit(config, log, ranks, without=crossfit, start=factors)
                without.save(tmp / CROSSFIT)
                result.crossfit_seconds = time.monotonic() - begin
            meta |= {"dim": factors.dim, "seconds": asdict(result)}
    if ranks.rank == 0:
        print(
            f"{config.out}: {log.num_users:,} users and {log.num_items:,} items x {factors.dim} "
            f"in {result.seconds:.1f} s"
            + (f" + {result.crossfit_seconds:.1f} s cross-fitted" if crossfit else "")
        )
    return result


def _fit(
    config: FactorizeConfig,
    log: Log,
    ranks: Ranks,
    *,
    without: SampleConfig | None = None,
    start: Factors | None = None,
) -> tuple[Factors, list[tuple[float, float]]]:
    als = config.als if start is None else replace(config.als, sweeps=config.crossfit_sweeps)
    model = ALS(als, log.num_users, log.num_items, device=ranks.device)
    with agreed():
        for users, items, values in _read(config, log, ranks, without):
            model.add(users, items, values)
    sweeps: list[tuple[float, float]] = []
    began = time.monotonic()
    description = "als" if start is None else "als, without the sample"
    with tqdm(
        total=als.sweeps, desc=description, unit="sweep", disable=None if ranks.rank == 0 else True
    ) as bar:

        def on_sweep(report: SweepReport) -> None:
            sweeps.append((report.objective, time.monotonic() - began))
            bar.update()
            bar.set_postfix_str(f"objective {report.objective:.6g}", refresh=False)
            if ranks.rank == 0:
                bar.write(
                    f"sweep {report.sweep} of {report.sweeps}: objective {report.objective:.6g}, "
                    f"{report.seconds:.2f} s, {report.eta:.0f} s left"
                )

        return model.fit(on_sweep, start), sweeps


def _read(
    config: FactorizeConfig, log: Log, ranks: Ranks, without: SampleConfig | None
) -> Iterator[tuple[Any, Any, Any]]:
    """This rank's share of the row groups: users, items, and the labels where they count."""
    schema = log.schema
    columns = [schema.user, schema.item] + ([schema.label] if config.use_label and schema.label else [])
    chunks = iter_columns(
        log.train, columns, rank=ranks.rank, world=ranks.world, sample=without, complement=without is not None
    )
    for data in chunks:
        yield data[schema.user], data[schema.item], data[schema.label] if config.use_label else None
