"""Resume of `compare cadc` and `compare both`: the same command loads the runs that a stopped one has finished.

All factors, maps and networks of a comparison are artifacts in one folder next to its output, and an artifact is
complete once it has its name. The folder becomes the output at the end.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from recpress.data.dataset import artifact, object_store
from recpress.data.dataset.log import Log
from recpress.data.errors import InputError
from recpress.trainer.artifacts.factors import claimed
from recpress.trainer.compare.config import CompareBothConfig, CompareCadcConfig
from recpress.trainer.config import TrainConfig
from recpress.trainer.distributed.heartbeat import activity, barrier
from recpress.trainer.distributed.rank_errors import raise_on_all_ranks
from recpress.trainer.errors import same_command_resumes
from recpress.trainer.evaluate.config import EvaluateConfig
from recpress.trainer.evaluate.stage import evaluate
from recpress.trainer.factorize.config import FactorizeConfig
from recpress.trainer.factorize.stage import FactorizeResult, factorize
from recpress.trainer.loop.config import FitResult
from recpress.trainer.observability.progress import UnitProgress, comparisons
from recpress.trainer.train.stage import TrainResult, train

COMPARISON = "comparison"
"""Kind of the artifact that a comparison writes."""
_SETTINGS = "comparison.json"
_MAY_DIFFER = ("out", "overwrite", "device")


@contextmanager
def comparison_folder(config: CompareCadcConfig | CompareBothConfig) -> Iterator[Path]:
    """The folder of all runs, which becomes `config.out` when the block ends. Collective.

    If the block raises, the folder remains, unless nothing in it can be resumed and the error is one of the input.

    Raises:
        InputError: `out` exists or cannot be written; another run writes to it. On every rank.
        Preempted: a signal stopped the block.
    """
    folder = _folder(config.out)
    with raise_on_all_ranks():
        if dist.get_rank() == 0:
            artifact.check_target(config.out, config.overwrite, COMPARISON, [config.data or ""])
    with claimed(config.out, str(folder)), same_command_resumes():
        if dist.get_rank() == 0 and _kept(folder):
            comparisons.info("resuming with the factors, maps and models of %s", folder)
        try:
            yield folder
        except InputError:
            if dist.get_rank() == 0 and not _kept(folder):
                shutil.rmtree(folder, ignore_errors=True)
            raise
        barrier()
        with activity(f"writing {config.out}"):
            if dist.get_rank() == 0:
                (folder / _SETTINGS).unlink()
                meta = {"config": asdict(config)}
                artifact.commit(folder, config.out, COMPARISON, meta, overwrite=config.overwrite)
                shutil.rmtree(folder, ignore_errors=True)  # an object store has a copy
        barrier()


def check_same_comparison(config: CompareCadcConfig | CompareBothConfig, folder: Path, log: Log) -> None:
    """Raise InputError if the runs in the folder are of other settings or another log; note them if it is empty."""
    settings = {name: value for name, value in asdict(config).items() if name not in _MAY_DIFFER}
    settings["files of the log"] = [[file["size"], file["fingerprint"]] for file in log.inputs()]
    text = json.dumps(settings, indent=1, default=str)
    path = folder / _SETTINGS
    if not path.exists():
        object_store.write_bytes(path, text.encode())
        return
    before, now = json.loads(path.read_bytes()), json.loads(text)
    if differ := [name for name in before.keys() | now.keys() if before.get(name) != now.get(name)]:
        raise InputError(
            f"{folder}: has the runs of a comparison with other settings ({', '.join(sorted(differ))}); rerun its "
            "command, remove the folder, or choose another out"
        )


def factorize_once(config: FactorizeConfig, progress: UnitProgress) -> FactorizeResult:
    """`factorize`, or the result of the factors that exist. Collective."""
    if not is_complete(config.out):
        return factorize(config)
    progress.loaded()
    return FactorizeResult(**artifact.read_manifest(config.out)["seconds"])


def train_once(config: TrainConfig, progress: UnitProgress, *, cases: bool = False) -> TrainResult:
    """`train`, or the result of the model that exists. Collective.

    Args:
        cases: whether `TrainResult.cases` is needed.
    """
    if not is_complete(config.out):
        return train(config)
    progress.loaded()
    found: dict[str, Any] = artifact.read_manifest(config.out)
    per_case: dict[str, torch.Tensor] = {}
    if cases:
        ranked = EvaluateConfig(
            data=config.data,
            model=config.out,
            schema=config.schema,
            evaluation=config.evaluation,
            device=config.device,
        )
        evaluate(ranked, per_case)
    fitted = FitResult(
        steps=found["steps"],
        train_seconds=found["seconds"]["train"],
        evaluations=found["evaluations"],
        best=found["best"],
    )
    return TrainResult(
        fitted,
        found["metrics"],
        found["rows"],
        found["seconds"]["setup"],
        found["table_bytes"],
        found["map_bytes"],
        factorization=found["factorization_metrics"],
        cases=per_case,
        validation=found["validation"],
        best_epoch=found["best_epoch"],
        fallback=found["fallback"],
    )


def is_complete(path: str) -> bool:
    """Whether rank 0 sees the artifact. Collective."""
    found = [Path(path).exists()]
    dist.broadcast_object_list(found)
    return found[0]


def _folder(out: str) -> Path:
    if not object_store.is_remote(out):
        return Path(object_store.beside(out, ".checkpoints"))
    return object_store.cache_folder() / f"compare-{hashlib.sha256(out.encode()).hexdigest()[:16]}"


def _kept(folder: Path) -> list[Path]:
    """The complete factors, maps and models, and the checkpoints of others."""
    return [path.parent for path in folder.rglob(artifact.MANIFEST) if not path.parent.name.endswith("log")]
