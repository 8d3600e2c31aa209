"""Configuration of `recpress train --model` for models other than the two-tower network. Does not import torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, make_dataclass
from typing import Any, Literal, TypeVar

from recpress.data.config import SampleConfig, StreamConfig
from recpress.data.errors import InputError
from recpress.trainer.config import OptimizerConfig, RunConfig, WindowConfig, at_least
from recpress.trainer.features.config import FeatureConfig
from recpress.trainer.model.factory import MODELS, TWO_TOWER, config_of

try:
    from tyro.conf import Suppress
except ImportError:  # only the command line needs tyro
    Suppress = None  # type: ignore[misc]

_MAIN = """data out maps warm-start dim label-threshold sample.rate epochs stream.batch-size evaluation.metric
checkpoint.minutes"""
Base = TypeVar("Base")


@dataclass(frozen=True, kw_only=True)
class HeldOutConfig:
    """Validation rows, which choose the weights and stop training early."""

    every: int = 1
    """Epochs between evaluations; with 0, and --evaluation.every-steps 0: no validation rows, all epochs are run."""
    every_steps: int = 0
    """Steps between further evaluations; 0: none."""
    metric: Literal["LogLoss", "AUC", "NE"] = "LogLoss"
    """Metric that chooses the weights and stops training early."""
    patience: int = 2
    """Stop after this many evaluations without improvement; 0: run all epochs. The best weights are published in either
    case."""
    source: Literal["auto", "sample"] = "auto"
    """Validation rows. `auto`: the `val` part of the log, otherwise as `sample`; `sample`: a tenth of the sampled rows,
    which are excluded from training."""

    def __post_init__(self) -> None:
        at_least(0, every=self.every, every_steps=self.every_steps, patience=self.patience)

    @property
    def while_training(self) -> bool:
        """Whether there are validation rows."""
        return self.every > 0 or self.every_steps > 0


@dataclass(frozen=True, kw_only=True)
class TrainModelConfig(RunConfig):
    """Train a model on the labels of a log."""

    factory: Suppress[str] = ""
    """Name of the model, as --model has it."""
    model: Any = None
    """Options of the model: a dataclass."""
    features: Suppress[Mapping[str, FeatureConfig]] = field(default_factory=dict)
    """The features, from a TOML file; empty: all columns of the schema."""
    maps: str | None = None
    """Folder of `recpress hash`: its id maps compress the tables of the columns that they are of."""
    dim: int = 0
    """Dimension of tables whose feature does not set one; 0: that of frozen rows, otherwise 16."""
    label_threshold: float | None = None
    """Labels from here on are 1, others 0; by default labels must be 0 or 1."""
    epochs: int = 5
    """Maximum of passes over the rows; training stops early (--evaluation.patience)."""
    stream: StreamConfig = field(default_factory=lambda: StreamConfig(batch_size=2048))
    sample: SampleConfig = field(default_factory=SampleConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    evaluation: HeldOutConfig = field(default_factory=HeldOutConfig)
    metrics: WindowConfig = field(default_factory=WindowConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(1, epochs=self.epochs)
        at_least(0, dim=self.dim, stop_after=self.stop_after)
        if self.label_threshold is not None and not math.isfinite(self.label_threshold):
            raise InputError(f"label_threshold is {self.label_threshold}, expected a finite number")
        if self.dim % 4:
            raise InputError(f"dim is {self.dim}, expected a multiple of 4")


def chosen_model(arguments: Sequence[str], content: dict[str, Any] | None, section: str = "") -> tuple[str, list[str]]:
    """(model, the arguments without --model).

    Args:
        content: of the TOML file. Its `model`, or `name` in its table `model`, is removed.
        section: of the options of `train` in those of the command: `--train.model` and `[train]`.

    Raises:
        InputError: --model without a value; the file names a module.
    """
    rest: list[str] = []
    named: str | None = None
    words = iter(arguments)
    option = f"{section}.model" if section else "model"
    for word in words:
        flag, equals, value = word.partition("=")
        if flag != f"--{option}":
            rest.append(word)
            continue
        named = value if equals else next(words, "")
        if not named or named.startswith("-"):
            raise InputError(f"--{option}: expected one of {', '.join([TWO_TOWER, *MODELS])}, or pkg.module:make")
    in_file: Any = TWO_TOWER
    content = content if content is None or not section else content.get(section)
    if isinstance(content, dict) and "model" in content:
        of_file = content["model"]
        in_file = of_file.pop("name", TWO_TOWER) if isinstance(of_file, dict) else content.pop("model")
    if in_file != TWO_TOWER and in_file not in MODELS:
        raise InputError(
            f"{option} is {in_file!r} in the configuration file, expected one of {', '.join([TWO_TOWER, *MODELS])}; a "
            f"module is imported only if the command line names it: --{option} {in_file}"
        )
    return named or str(in_file), rest


def model_options(name: str, base: type[Any]) -> type[Any]:
    """`base` with the options of this model, for the command line.

    Args:
        base: a TrainModelConfig, or a configuration whose section `train` is one.

    Raises:
        InputError: there is no such model, or its factory cannot be used.
    """
    if issubclass(base, TrainModelConfig):
        options = config_of(name)
        part = ("model", options, field(default_factory=options))
    else:
        train = model_options(name, TrainModelConfig)
        part = ("train", train, field(default_factory=lambda: train(data="", out="")))
    made = make_dataclass(base.__name__, [part], bases=(base,), frozen=True, kw_only=True)
    made.__doc__ = base.__doc__
    return made


def main_options(name: str, base: type[Any], more: str) -> list[str]:
    """Options that the short `--help` lists: `more`, and those of `train --model`."""
    options = [f"model.{part.name.replace('_', '-')}" for part in fields(config_of(name))]
    if issubclass(base, TrainModelConfig):
        return [*more.split(), *_MAIN.split(), *options, "device", "overwrite"]
    return [*more.split(), *(f"train.{option}" for option in options)]


def completed(parsed: Any, base: type[Base], name: str, features: Mapping[str, FeatureConfig]) -> Base:
    """What the command line gave, as a `base`, with the name of the model and the features of the file."""
    values = {part.name: getattr(parsed, part.name) for part in fields(base)}  # type: ignore[arg-type]
    if issubclass(base, TrainModelConfig):
        return base(**{**values, "factory": name, "features": dict(features)})
    return base(**{**values, "train": completed(parsed.train, TrainModelConfig, name, features)})
