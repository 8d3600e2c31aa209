"""`compare both`, small: what it finds, writes and refuses."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from recpress.data.config import NegativesConfig, StreamConfig, SynthConfig
from recpress.data.errors import InputError
from recpress.modules.config import ALSConfig, TowersConfig, TwoTowerConfig
from recpress.trainer.compare.both import compare_both
from recpress.trainer.compare.both_result import BothResult, Point, format_both_table
from recpress.trainer.compare.config import CompareBothConfig
from recpress.trainer.config import EvaluationConfig, NetworkConfig, OptimizerConfig
from tests.ranks import run_on_ranks

LOG = SynthConfig(users=600, items=300, rows=18_000, tastes=10)
ALS = ALSConfig(factors=16, sweeps=4, auto=False)


def both_config(out: Path, **more: object) -> CompareBothConfig:
    network = NetworkConfig(
        stream=StreamConfig(batch_size=256),
        negatives=NegativesConfig(count=16, shared=True),
        model=TwoTowerConfig(towers=TowersConfig(kind="residual", hidden=(8,))),
        optimizer=OptimizerConfig(learning_rate=1e-4),
        epochs=1,
    )
    given = {
        "synth": LOG, "als": ALS, "seeds": (0,), "levels": (1.0, 0.5, 0.17), "rates": (0.2,),
        "frozen": network, "choose": False,
    } | more  # fmt: skip
    return CompareBothConfig(out=str(out), **given)


def test_both_keeps_to_the_bytes_and_reads_the_share_of_the_rows(tmp_path: Path) -> None:
    config = both_config(tmp_path / "both", evaluation=EvaluationConfig(k=(10,)))
    (result,) = run_on_ranks(compare_both, 1, config)
    assert {(point.level, point.rate) for point in result.points} == {
        (level, rate) for level in config.levels for rate in (0.0, 0.2)
    }
    for point in result.points:
        if not point.rate:
            assert point.bytes <= 1.02 * point.level * result.full_bytes
            assert point.rows_read == 0
        else:
            assert 0.1 < point.rows_read / 18_000 < 0.3
    errors = [point.error for point in result.ordered() if point.rate == 0]
    assert errors[0] == 0
    assert errors == sorted(errors)
    full, small = result.full(0.2), min((p for p in result.points if p.rate), key=lambda p: p.level)
    assert small.mean("NDCG@10") > 0.5 * full.mean("NDCG@10")
    saved = json.loads((tmp_path / "both" / "result.json").read_text())
    for point in saved["points"]:
        if point["form"].endswith("one per id"):
            assert point["serving_bytes"] == point["bytes"]
        else:  # two row numbers an id, of 4 bytes instead of a few bits each
            assert 0 < point["serving_bytes"] - point["bytes"] < 8 * 900
    assert "bytes at serving" in format_both_table(result)
    page = (tmp_path / "both" / "report.html").read_text()
    assert "<svg" in page
    assert "of the ids" in page


def test_levels_and_rates_out_of_range_are_refused() -> None:
    with pytest.raises(InputError, match=r"levels: 1\.5, expected numbers in \(0, 1\]"):
        CompareBothConfig(levels=(1.5,))
    with pytest.raises(InputError, match=r"rates: 0\.0"):
        CompareBothConfig(rates=(0.0,))


def test_a_level_below_the_maps_is_refused(tmp_path: Path) -> None:
    config = both_config(tmp_path / "both", levels=(0.01,))
    with pytest.raises(InputError, match=r"levels: 0\.01 of the full tables' bytes does not hold the maps"):
        run_on_ranks(compare_both, 1, config)
    assert not (tmp_path / "both").exists()


def test_where_no_epoch_is_better_than_the_factors_no_network_is_trained(tmp_path: Path) -> None:
    config = both_config(tmp_path / "both", levels=(1.0,), choose=True)
    idle = replace(config.frozen, optimizer=OptimizerConfig(learning_rate=1e-30))  # no epoch changes a score
    (result,) = run_on_ranks(compare_both, 1, replace(config, frozen=idle))
    alone, network = result.full(0.0), result.full(0.2)
    assert (network.epochs, network.rows_read) == (0, 0)
    assert network.metrics == alone.metrics
    assert "0 epochs" in format_both_table(result)


def test_the_chosen_number_of_epochs_is_trained_on_two_ranks(tmp_path: Path) -> None:
    config = both_config(tmp_path / "both", levels=(1.0,), choose=True)
    network = replace(config.frozen, epochs=2)
    result, other = run_on_ranks(compare_both, 2, replace(config, frozen=network))
    point = result.full(0.2)
    assert 0 <= point.epochs <= 2
    assert (point.rows_read > 0) == (point.epochs > 0)
    assert other.full(0.2).metrics == point.metrics


def test_a_difference_within_the_noise_of_the_seeds_is_marked() -> None:
    def point(level: float, *values: float) -> Point:
        return Point(
            level=level, form="", rate=0.0, rows=1, bytes=1, serving_bytes=1, rows_read=0, error=0.0,
            metrics={"HR@10": values},
        )  # fmt: skip

    points = point(1.0, 0.70, 0.72), point(0.5, 0.69, 0.725), point(0.25, 0.60, 0.62)
    result = BothResult(title="", points=points, metrics=("HR@10",), full_bytes=1, total_rows=1)
    assert [result.tied(p, "HR@10") for p in points] == [False, True, False]
    zero = BothResult(title="", points=(point(1.0, 0.0),), metrics=("HR@10",), full_bytes=1, total_rows=1)
    assert not zero.tied(zero.points[0], "HR@10")
    assert "nan" in format_both_table(zero)


def test_open_settings_of_the_factorization_are_chosen_once_for_all_seeds(tmp_path: Path) -> None:
    config = both_config(
        tmp_path / "both", levels=(1.0,), rates=(), seeds=(0, 1), als=ALSConfig(max_factors=16, sweeps=2)
    )
    (result,) = run_on_ranks(compare_both, 1, config)
    chosen = result.config["als"]
    assert chosen["auto"] is False
    assert chosen["factors"] <= 16
    assert result.full_bytes == 4 * chosen["factors"] * 900
    assert {len(point.metrics["NDCG@10"]) for point in result.points} == {2}
