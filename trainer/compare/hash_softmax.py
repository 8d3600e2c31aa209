"""The contrastive factorization as the backbone of `compare hash`: full and shared rows are trained by its loss."""

from __future__ import annotations

import time
from dataclasses import replace

import torch

from recpress.modules.als.checks import check_factors
from recpress.modules.als.exchange import Exchange
from recpress.modules.als.factors import Factors
from recpress.modules.config import ContrastiveConfig
from recpress.modules.contrastive.auto import choose
from recpress.modules.contrastive.factorization import Contrastive
from recpress.modules.hashing.id_map import IdMap
from recpress.modules.hashing.shared_contrastive import fit_shared
from recpress.trainer.compare.hash_backbone import Backbone, Report, Vectors
from recpress.trainer.compare.hash_settings import Setting


class SoftmaxBackbone(Backbone):
    """Vectors of `factorize --method softmax`."""

    NOTE = (
        "The backbone is a contrastive factorization with one row per id (full) or with the rows of the map: the map "
        "is made, rows start nearest to the full factors, and epochs of the same loss follow. The score is the cosine "
        "times a power of the item's count; an id has no other input than its row."
    )
    _chosen: ContrastiveConfig | None = None  # chosen with the first seed, the same for all

    def factorize(self, seed: int) -> tuple[Factors, str]:
        given, words, first = self.config.softmax, "", self._chosen is None
        if self._chosen is None:
            choice = choose(replace(given, seed=seed), self._csrs[0], Exchange(None, torch.device("cpu")), "full")
            self._chosen = replace(given, **choice.settings)
            words = choice.line() if choice.rows else ""
        model = Contrastive(replace(self._chosen, seed=seed), self.log.num_users, self.log.num_items)
        run = model.prepare(interactions=self._csrs)
        run.train()
        full = run.factors()
        if first:
            self.dim, self.warnings = full.dim, check_factors(full)
        return full, words

    def fit(self, setting: Setting, maps: tuple[IdMap, IdMap], full: Factors, report: Report) -> tuple[Vectors, float]:
        """(vectors read through the maps, seconds): epochs of the loss from the rows nearest to the full factors."""
        assert self._chosen is not None
        assert setting.sweeps is not None
        began = time.perf_counter()
        config = replace(self._chosen, seed=setting.hash.seed)
        found = fit_shared(config, *self._csrs, *maps, full.users, full.items, epochs=setting.sweeps)
        return Vectors(found.users, found.items), time.perf_counter() - began
