"""The checkpoints of a training run, and what a resumed run must have in common with the run before."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from recpress.data.dataset import artifact, object_store
from recpress.data.dataset.log import SIDES, Log
from recpress.data.stream.loader import InteractionStream
from recpress.data.stream.order import ORDER_VERSION
from recpress.trainer.checkpoint.checkpoints import Checkpoints
from recpress.trainer.config import RunConfig
from recpress.trainer.distributed.process_group import Ranks
from recpress.trainer.distributed.rank_errors import raise_on_all_ranks
from recpress.trainer.versions import versions

logger = logging.getLogger(__name__)


def checkpoint_folder(config: RunConfig) -> str:
    """By default next to the output."""
    return config.checkpoint.folder or object_store.beside(config.out, ".checkpoints")


def open_checkpoints(
    config: RunConfig, log: Log, global_batch: int, artifacts: Mapping[str, str | None], **inputs: Any
) -> Checkpoints:
    """The checkpoints of this run; `start` is the one to resume from. Collective.

    Args:
        artifacts: name -> path of the other inputs of the run; None: there is no such input.
        inputs: what else the run depends on, as JSON values.

    Raises:
        InputError: the folder cannot be used, or has checkpoints of a run with other inputs. On every rank.
    """
    with raise_on_all_ranks():
        fingerprints = {"log": digest([[file["size"], file["fingerprint"]] for file in log.inputs()])}
        fingerprints["order of the rows"] = str(ORDER_VERSION)
        fingerprints |= {f"{side} vocabulary": str(log.vocabulary_fingerprint(side)) for side in SIDES}
        for name, path in artifacts.items():
            if path is not None:
                fingerprints[name] = digest(artifact.describe_folder(path))
        fingerprints |= {name: digest(value) for name, value in inputs.items()}
    describe = {
        "versions": versions(),
        "config": asdict(config),
        "inputs": fingerprints,
        "global_batch": global_batch,
    }
    return Checkpoints(config.checkpoint, checkpoint_folder(config), describe)


def keep_global_batch(
    stream: InteractionStream, checkpoints: Checkpoints, ranks: Ranks, make: Callable[[int], InteractionStream]
) -> InteractionStream:
    """The stream of the run. If the world size has changed, it keeps the global batch size of the checkpoint.

    Args:
        make: global batch size -> the same stream with this size.
    """
    if checkpoints.start is None or checkpoints.start.manifest["global_batch"] == stream.global_batch:
        return stream
    rows = int(checkpoints.start.manifest["global_batch"])
    checkpoints.describe["global_batch"] = rows
    if ranks.rank == 0:
        per_rank = rows // ranks.world_size
        logger.warning("world size changed; keeping global batch size %s (%s per rank)", f"{rows:,}", f"{per_rank:,}")
    with raise_on_all_ranks():
        return make(rows)


def digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]
