"""LightGCN as the backbone of `compare hash`: full and shared rows are trained from random ones, with checkpoints."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import torch
from tqdm import tqdm

from recpress.data.dataset import object_store
from recpress.data.errors import InputError
from recpress.modules.als.factors import Factors
from recpress.modules.hashing.id_map import IdMap, map_fingerprint
from recpress.modules.row_source import round_up
from recpress.trainer.compare.config import CompareHashConfig
from recpress.trainer.compare.hash_backbone import Backbone, Report, Vectors
from recpress.trainer.compare.hash_settings import Setting
from recpress.trainer.compare.light_gcn import Evaluation, LightGCN, LightGCNTraining


class LightGCNBackbone(Backbone):
    """Vectors of LightGCN. The factorization only gives the embedding that some methods make maps from.

    Each run has a checkpoint in the folder of checkpoints, named by everything that its steps depend on. So the same
    command after a stop continues where it was, and loads finished runs; with more epochs or patience, it trains
    them further.
    """

    NOTE = (
        "The backbone is LightGCN (He et al. 2020) with one row per id (full) or with the rows of the map: rows start "
        "at random and are trained by BPR, stopped early on the validation examples. Propagation over the graph of "
        "train examples lets ids that share a row differ; serving needs the graph, or the vectors of all ids, and the "
        "bytes count neither. The factorization only gives the vectors that some methods make maps from."
    )

    def __init__(self, config: CompareHashConfig, folder: Path) -> None:
        super().__init__(config, folder)
        self.checkpoints = checkpoint_folder(config)
        splits = [split for split in (self.log.train, self.log.val, self.log.test) if split is not None]
        files = [[file["fingerprint"] for file in split.describe_files()] for split in splits]
        steps = asdict(replace(config.lightgcn, epochs=1, patience=1))  # of which neither changes a step
        self._about = [files, steps, config.metric, config.choose_users, list(config.evaluation.k)]

    @property
    def row_bytes(self) -> int:
        return 4 * round_up(self.config.lightgcn.dim)

    @property
    def vector_dim(self) -> int:
        return self.config.lightgcn.dim

    def full_vectors(self, full: Factors, seed: int, report: Report) -> tuple[Vectors, float]:
        return self._train(None, seed, report)

    def fit(self, setting: Setting, maps: tuple[IdMap, IdMap], full: Factors, report: Report) -> tuple[Vectors, float]:
        return self._train(maps, setting.hash.seed, report)

    def finish(self) -> None:
        shutil.rmtree(self.checkpoints, ignore_errors=True)

    def _train(self, maps: tuple[IdMap, IdMap] | None, seed: int, report: Report) -> tuple[Vectors, float]:
        config, users = self.config, self.log.num_users

        def split(vectors: torch.Tensor) -> Vectors:
            return Vectors(vectors[:users], vectors[users:])

        def say(found: Evaluation) -> None:
            left = tqdm.format_interval(found.seconds * found.least_epochs)
            report(
                f"epoch {found.epoch} of at most {config.lightgcn.epochs}: loss {found.loss:.4f}, {config.metric} "
                f"{found.value:.4f} of val (best {found.best:.4f}), {found.seconds:.1f} s per epoch, "
                f"about {left} left without further improvement"
            )

        model = LightGCN(self.train, users, self.log.num_items, maps, config.lightgcn, seed)
        digests = [map_fingerprint(id_map).tolist() for id_map in maps or ()]
        about = json.dumps([*self._about, digests, [id_map.method for id_map in maps or ()], seed])
        path = self.checkpoints / f"{hashlib.sha256(about.encode()).hexdigest()[:16]}.npz"
        training = LightGCNTraining(
            model, lambda vectors: self.rank(*split(vectors), self.val)[config.metric], path, say
        )
        fitted = training.run()
        return split(fitted.vectors), fitted.seconds


def checkpoint_folder(config: CompareHashConfig) -> Path:
    """Raises InputError if it would be in an object store."""
    folder = config.checkpoints or config.out.rstrip("/") + ".checkpoints"
    if object_store.is_remote(folder):
        raise InputError(f"checkpoints: {folder}, expected a folder on this machine (--checkpoints)")
    return Path(folder)
