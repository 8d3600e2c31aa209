"""Configuration of `recpress pipeline`. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from recpress.data.config import Schema
from recpress.data.errors import InputError
from recpress.trainer.config import TrainConfig
from recpress.trainer.evaluate.config import EvaluateConfig
from recpress.trainer.factorize.config import FactorizeConfig
from recpress.trainer.features.config import FACTORIZED
from recpress.trainer.hash.config import HashStageConfig
from recpress.trainer.train.config import TrainModelConfig

StageConfig = FactorizeConfig | HashStageConfig | TrainConfig | TrainModelConfig | EvaluateConfig
StageName = Literal["factorize", "hash", "train", "evaluate"]
ORDER: tuple[StageName, ...] = ("factorize", "hash", "train", "evaluate")


@dataclass(frozen=True, kw_only=True)
class PipelineConfig:
    """The stages one after the other, in one process group. Stages that are complete are skipped."""

    data: str
    """The log: a folder, file or glob."""
    out: str
    """Folder of the outputs: factors, maps, model, metrics.json."""
    stages: tuple[StageName, ...] = ("factorize", "train", "evaluate")
    """Stages to run, in any order."""
    schema: Schema = field(default_factory=Schema)
    """Columns of the log, for every stage."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the stages run; maps are built on the CPU."""
    factorize: FactorizeConfig = field(default_factory=lambda: FactorizeConfig(data="", out=""))
    """For every stage: the default of log, schema, device and folders is that of the pipeline."""
    hash: HashStageConfig = field(default_factory=lambda: HashStageConfig(data="", out=""))
    train: TrainConfig = field(default_factory=lambda: TrainConfig(data="", out=""))
    evaluate: EvaluateConfig = field(default_factory=lambda: EvaluateConfig(data="", model=""))

    def __post_init__(self) -> None:
        if not self._stages or len(set(self.stages)) != len(self.stages):
            raise InputError(f"stages: {', '.join(self.stages) or 'none'}; expected at least one, each once")
        for name in ("factorize", "hash", "train"):
            if getattr(self, name).overwrite:
                raise InputError(f"{name}.overwrite: a pipeline makes only missing outputs; remove the folder instead")

    @property
    def _stages(self) -> tuple[StageName, ...]:
        return self.stages

    @property
    def needs_pairs(self) -> bool:
        """Whether a stage needs users and items."""
        return not self.hash.features

    def chosen(self) -> dict[StageName, StageConfig]:
        """The stages to run, in order, each with its full configuration."""
        factors, maps, model = self._folders()
        made = factors if "factorize" in self.stages else None
        starts = made if self.train.model.tables.strategy != "random" else None
        train = replace(
            self.train,
            out=model,
            factors=self.train.factors or starts,
            hash=self.train.hash or (maps if "hash" in self.stages else None),
        )
        return self._ordered(train, replace(self.factorize, out=factors, **self._crossfit()), self.stages)

    def _folders(self) -> tuple[str, str, str]:
        """Of factors, maps and the model."""
        from recpress.data.dataset.object_store import join  # imports pyarrow, which --help must not

        return (
            self.factorize.out or join(self.out, "factors"),
            self.hash.out or join(self.out, "maps"),
            self.train.out or join(self.out, "model"),
        )

    def _ordered(
        self, train: TrainConfig | TrainModelConfig, factorize: FactorizeConfig, stages: Sequence[StageName]
    ) -> dict[StageName, StageConfig]:
        from recpress.data.dataset.object_store import join

        factors, maps, model = self._folders()
        every: dict[StageName, StageConfig] = {
            "factorize": factorize,
            "hash": replace(
                self.hash, out=maps, factors=self.hash.factors or (factors if "factorize" in stages else None)
            ),
            "train": train,
            "evaluate": replace(
                self.evaluate,
                model=self.evaluate.model or (model if "train" in stages else factors),
                out=self.evaluate.out or join(self.out, "metrics.json"),
            ),
        }
        return {name: self._common(every[name]) for name in ORDER if name in stages}

    def _crossfit(self) -> dict[str, Any]:
        """Factors that have not seen the network's sample, unless configured otherwise: a network on frozen tables must
        be trained on scores of examples that the factorization has not seen."""
        strategy, sample = self.train.model.tables.strategy, self.train.sample
        frozen = strategy == "auto" or strategy.startswith("frozen")
        wanted = frozen and "train" in self.stages and self.train.factors is None and self.train.crossfit != "no"
        rate = sample.rate or 0.1
        if not wanted or self.factorize.crossfit_rate or self.factorize.method == "logistic" or rate >= 1:
            return {}
        return {"crossfit_rate": rate, "crossfit_kind": sample.kind, "crossfit_seed": sample.seed}

    def _common(self, config: StageConfig) -> StageConfig:
        schema = self.schema if config.schema == Schema() else config.schema
        config = replace(config, data=config.data or self.data, schema=schema)
        if not isinstance(config, HashStageConfig) and config.device == "auto":
            config = replace(config, device=self.device)
        return config


@dataclass(frozen=True, kw_only=True)
class PipelineModelConfig(PipelineConfig):
    """The stages one after the other, in one process group, with a model of labels. Stages that are complete are
    skipped."""

    stages: tuple[StageName, ...] = ()
    """Stages to run, in any order; by default train and evaluate, with factorize before them if a feature has
    frozen = "@factorize"."""
    train: TrainModelConfig = field(  # type: ignore[assignment]
        default_factory=lambda: TrainModelConfig(data="", out="")
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        unused = "factorize" in self.stages and "hash" not in self.stages and not self._freezes
        if unused and self.train.factory:  # complete, with the features of the file
            raise InputError(
                f'stages: nothing uses the factors of factorize; expected frozen = "{FACTORIZED}" in a feature of the '
                "file, or stages without it"
            )
        if self.evaluate.factory:
            raise InputError("evaluate.factory: expected none; it is that of --train.model")

    @property
    def _freezes(self) -> bool:
        return any(feature.frozen == FACTORIZED for feature in self.train.features.values())

    @property
    def _stages(self) -> tuple[StageName, ...]:
        return self.stages or (("factorize", "train", "evaluate") if self._freezes else ("train", "evaluate"))

    @property
    def needs_pairs(self) -> bool:
        """Whether a stage needs users and items."""
        return "factorize" in self._stages or ("hash" in self._stages and not self.hash.features)

    def chosen(self) -> dict[StageName, StageConfig]:
        """The stages to run, in order, each with its full configuration."""
        factors, maps, model = self._folders()
        features = {
            name: replace(feature, frozen=factors) if feature.frozen == FACTORIZED else feature
            for name, feature in self.train.features.items()
        }
        train = replace(
            self.train,
            out=model,
            features=features,
            maps=self.train.maps or (maps if "hash" in self._stages else None),
        )
        found = self._ordered(train, replace(self.factorize, out=factors), self._stages)
        if isinstance(evaluate := found.get("evaluate"), EvaluateConfig):
            factory = self.train.factory if ":" in self.train.factory else ""
            found["evaluate"] = replace(evaluate, model=self.evaluate.model or model, factory=factory)
        return found
