"""Configuration of `recpress pipeline`. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

from recpress.data.config import Schema
from recpress.data.errors import InputError
from recpress.trainer.config import TrainConfig
from recpress.trainer.evaluate.config import EvaluateConfig
from recpress.trainer.factorize.config import FactorizeConfig
from recpress.trainer.hash.config import HashStageConfig

StageConfig = FactorizeConfig | HashStageConfig | TrainConfig | EvaluateConfig
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
        if not self.stages or len(set(self.stages)) != len(self.stages):
            raise InputError(f"stages: {', '.join(self.stages) or 'none'}; expected at least one, each once")
        for name in ("factorize", "hash", "train"):
            if getattr(self, name).overwrite:
                raise InputError(f"{name}.overwrite: a pipeline makes only missing outputs; remove the folder instead")

    def chosen(self) -> dict[StageName, StageConfig]:
        """The stages to run, in order, each with its full configuration."""
        from recpress.data.dataset.object_store import join  # imports pyarrow, which --help must not

        factors = self.factorize.out or join(self.out, "factors")
        maps = self.hash.out or join(self.out, "maps")
        model = self.train.out or join(self.out, "model")
        made = factors if "factorize" in self.stages else None
        starts = made if self.train.model.tables.strategy != "random" else None
        every: dict[StageName, StageConfig] = {
            "factorize": replace(self.factorize, out=factors, **self._crossfit()),
            "hash": replace(self.hash, out=maps, factors=self.hash.factors or made),
            "train": replace(
                self.train,
                out=model,
                factors=self.train.factors or starts,
                hash=self.train.hash or (maps if "hash" in self.stages else None),
            ),
            "evaluate": replace(
                self.evaluate,
                model=self.evaluate.model or (model if "train" in self.stages else factors),
                out=self.evaluate.out or join(self.out, "metrics.json"),
            ),
        }
        return {name: self._common(every[name]) for name in ORDER if name in self.stages}

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
