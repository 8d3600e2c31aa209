"""The models of `recpress train --model`: by a name of ours, or by the address `pkg.module:make` of a factory.

A factory is a function of its configuration, a dataclass with defaults whose fields become options `--model.*`, and of
`ModelInputs`. It returns a module that maps a batch to (loss, predictions); see `recpress.trainer.model.trained`.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import os
import sys
import typing
from collections.abc import Callable
from dataclasses import dataclass, is_dataclass
from typing import Any

from recpress.data.errors import InputError

TWO_TOWER = "two-tower"
MODELS = {
    "dlrm": ("recpress.trainer.model.config:DLRMConfig", "recpress.trainer.model.dlrm:make_dlrm"),
    "dcn-v2": ("recpress.trainer.model.config:DCNConfig", "recpress.trainer.model.dlrm:make_dcn"),
}
"""Name -> its configuration and its factory."""


@dataclass(frozen=True)
class Empty:
    """A model without options."""


def config_of(name: str) -> type:
    """The dataclass of the options of a model. Imports the module of a factory, but for a name of ours no torch.

    Raises:
        InputError: an unknown name; a factory that cannot be imported, or is not a factory.
    """
    if name in MODELS:
        return _attribute(MODELS[name][0])
    factory = factory_of(name)
    parameters = list(inspect.signature(factory).parameters.values())
    if len(parameters) != 2:
        raise InputError(f"--model {name}: takes {len(parameters)} arguments, expected make(config, inputs)")
    if parameters[0].annotation is inspect.Parameter.empty:
        return Empty
    try:
        config = typing.get_type_hints(factory)[parameters[0].name]
    except (NameError, TypeError) as error:
        raise InputError(f"--model {name}: its annotations cannot be resolved: {error}") from error
    if not (isinstance(config, type) and is_dataclass(config)):
        raise InputError(
            f"--model {name}: the first argument is annotated with {config!r}, expected a dataclass of options"
        )
    try:
        config()
    except TypeError as error:
        raise InputError(f"--model {name}: {config.__name__} has an option without a default: {error}") from error
    return config


def factory_of(name: str) -> Callable[[Any, Any], Any]:
    """The factory of a model. Raises InputError if there is none by this name."""
    if name in MODELS:
        return _attribute(MODELS[name][1])
    if ":" not in name:
        known = [TWO_TOWER, *MODELS]
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
        hint = f"nearest is '{near[0]}'; " if near else ""
        raise InputError(f"--model {name}: {hint}expected one of {', '.join(known)}, or pkg.module:make of your own")
    if os.getcwd() not in sys.path and "" not in sys.path:  # as `python -m` does
        sys.path.insert(0, os.getcwd())
    try:
        factory = _attribute(name)
    except AttributeError as error:
        raise InputError(f"--model {name}: {error}") from error
    except Exception as error:
        raise InputError(f"--model {name}: cannot be imported ({type(error).__name__}: {error})") from error
    if not callable(factory):
        raise InputError(f"--model {name}: is a {type(factory).__name__}, expected a function make(config, inputs)")
    return factory


def _attribute(address: str) -> Any:
    module, _, attribute = address.partition(":")
    return getattr(importlib.import_module(module), attribute)
