"""Runs `fit` for a training stage of any model: with the metrics log, the profiler and the Prometheus endpoint."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

from torchrec.distributed.model_parallel import DistributedModelParallel

from recpress.data.dataset import object_store
from recpress.trainer.checkpoint.checkpoints import Checkpoints
from recpress.trainer.config import RunConfig
from recpress.trainer.distributed.process_group import Ranks
from recpress.trainer.distributed.rank_errors import raise_on_all_ranks
from recpress.trainer.loop.config import FitConfig, FitResult
from recpress.trainer.loop.fit import Batches, Evaluate, fit
from recpress.trainer.loop.optimizer import TrainOptimizer
from recpress.trainer.loop.training_data import TrainingData
from recpress.trainer.observability.metrics_log import MetricsLog
from recpress.trainer.observability.profiling import Profiler

if TYPE_CHECKING:
    from recpress.trainer.observability.prometheus import Endpoint
    from recpress.trainer.observability.rec_metrics import RecMetrics

logger = logging.getLogger(__name__)


def run_fit(
    config: RunConfig,
    model: DistributedModelParallel,
    optimizer: TrainOptimizer,
    batches: Batches,
    fit_config: FitConfig,
    *,
    checkpoints: Checkpoints,
    ranks: Ranks,
    data: TrainingData,
    evaluate: Evaluate | None,
    accept: Callable[[Mapping[str, float]], bool] | None = None,
    metrics: RecMetrics | None,
) -> FitResult:
    """`fit`, with metrics, profile and endpoint as configured. Collective."""
    if ranks.rank == 0 and (config.tensorboard or object_store.is_remote(checkpoints.folder)):
        viewer = "tensorboard --logdir " if config.tensorboard else ""
        logger.info(f"metrics of the run: {viewer}{checkpoints.metrics}")
    with (
        _endpoint(config, checkpoints, ranks) as endpoint,
        MetricsLog(checkpoints.metrics, tensorboard=config.tensorboard, endpoint=endpoint) as metrics_log,
    ):
        return fit(
            model,
            optimizer,
            batches,
            fit_config,
            device=ranks.device,
            evaluate=evaluate,
            accept=accept,
            checkpoints=checkpoints,
            data=data,
            log=metrics_log,
            metrics=metrics,
            profiler=Profiler(config.profile, checkpoints.metrics, ranks.device) if config.profile.steps else None,
        )


@contextmanager
def _endpoint(config: RunConfig, checkpoints: Checkpoints, ranks: Ranks) -> Iterator[Endpoint | None]:
    """The Prometheus endpoint of rank 0, if configured."""
    endpoint: Endpoint | None = None
    with raise_on_all_ranks():
        if config.watch.port and ranks.rank == 0:
            from recpress.trainer.observability.prometheus import Endpoint

            endpoint = Endpoint(config.watch.port, config.watch.address, lambda: checkpoints.failures)
    try:
        yield endpoint
    finally:
        if endpoint is not None:
            endpoint.close()
