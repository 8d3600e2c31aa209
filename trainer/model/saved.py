"""Saved models of `recpress train --model`: their options, and the sharded model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from recpress.data.dataset import artifact
from recpress.data.dataset.log import Log
from recpress.data.errors import InputError
from recpress.trainer.artifacts.id_maps import load_maps
from recpress.trainer.distributed.process_group import Ranks
from recpress.trainer.distributed.rank_errors import raise_on_all_ranks
from recpress.trainer.features.feature_set import FeatureSet
from recpress.trainer.features.saved import saved_features
from recpress.trainer.model.factory import MODELS, config_of
from recpress.trainer.model.trained import ShardedModel, build_model
from recpress.trainer.model.two_tower import MAPS, WEIGHTS
from recpress.trainer.model.weights import load_weights


def saved_options(path: str, manifest: Mapping[str, Any], factory: str) -> tuple[str, Any]:
    """The name of a saved model, and its options.

    Args:
        factory: `pkg.module:make` of a model that is none of `MODELS`, as the command line has it.

    Raises:
        InputError: the factory is not given, or is another; the options are not those of this release.
    """
    try:
        name, given = manifest["model"]["name"], manifest["model"]["options"]
        values = {key: tuple(value) if isinstance(value, list) else value for key, value in given.items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: its manifest does not describe a model of this release: {error}") from error
    if name not in MODELS and factory != name:
        raise InputError(
            f"{path}: a model of --model {name}; pass --factory {name} to import it. A module is imported only if the "
            "command line names it"
        )
    if factory and factory != name:
        raise InputError(f"factory is '{factory}', but {path} is a model of --model {name}; expected that or none")
    try:
        return name, config_of(name)(**values)
    except TypeError as error:
        raise InputError(f"{path}: its options do not fit --model {name} of this release: {error}") from error


def load_labelled(
    path: str, manifest: dict[str, Any], log: Log, ranks: Ranks, *, factory: str, batch_size: int
) -> tuple[ShardedModel, FeatureSet]:
    """The model that `recpress train --model` wrote to `path`, sharded over these ranks, in eval mode. Collective.

    Args:
        log: whose rows it will read.
        factory: see `saved_options`.
        batch_size: rows of a batch per rank, for the planner.

    Raises:
        InputError: a file is missing or corrupt; the model does not fit the log or this release. On every rank.
    """
    features: FeatureSet | None = None
    with raise_on_all_ranks():
        name, options = saved_options(path, manifest, factory)
        folder = artifact.fetch(path, manifest, f"{WEIGHTS}/*", f"{MAPS}/*")
        names = [found.parent.name for found in sorted((folder / MAPS).glob("*/map.json"))]
        features = saved_features(path, manifest, log, load_maps(folder / MAPS, names, None))
    assert features is not None
    model = build_model(
        name, options, features, ranks, batch_size=batch_size, learning_rate=0.0, seed=0, rows_follow=True
    )
    with raise_on_all_ranks():
        load_weights(model.dmp, folder / WEIGHTS)
    model.dmp.eval()
    return model, features
