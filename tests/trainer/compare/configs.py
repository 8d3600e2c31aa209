"""Small comparisons that the tests share."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from recpress.data.config import NegativesConfig, StreamConfig, SynthConfig
from recpress.modules.config import ALSConfig, TowersConfig, TwoTowerConfig
from recpress.trainer.compare.config import CompareBothConfig, CompareCadcConfig, CompareHashConfig
from recpress.trainer.config import NetworkConfig, OptimizerConfig

LOG = SynthConfig(users=600, items=300, rows=18_000, tastes=10)


def cadc_config(out):
    config = CompareCadcConfig(
        out=str(out),
        synth=SynthConfig(users=500, items=400, rows=16_000, tastes=8, tastes_per_user=4),
        seeds=(0, 1),
        als=ALSConfig(factors=16, sweeps=6, mean_penalty=3.0),
        patience=1,
        trials=2,
    )
    shorter = {
        name: replace(getattr(config, name), epochs=2, stream=replace(getattr(config, name).stream, batch_size=512))
        for name in ("frozen", "random", "tuned")
    }
    return replace(config, **shorter)


def hash_config(out: Path, **more: object) -> CompareHashConfig:
    given = {
        "synth": LOG, "als": ALSConfig(factors=8, sweeps=4, auto=False),
        "seeds": (0,), "share": 0.15, "sweeps": (0, 1), "choose_users": 200, "trials": 4,
    } | more  # fmt: skip
    return CompareHashConfig(out=str(out), **given)


def both_config(out: Path, **more: object) -> CompareBothConfig:
    network = NetworkConfig(
        stream=StreamConfig(batch_size=256),
        negatives=NegativesConfig(count=16, shared=True),
        model=TwoTowerConfig(towers=TowersConfig(kind="residual", hidden=(8,))),
        optimizer=OptimizerConfig(learning_rate=1e-4),
        epochs=1,
    )
    given = {
        "synth": LOG, "als": ALSConfig(factors=16, sweeps=4, auto=False),
        "seeds": (0,), "levels": (1.0, 0.5, 0.17), "rates": (0.2,),
        "frozen": network, "choose": False,
    } | more  # fmt: skip
    return CompareBothConfig(out=str(out), **given)
