"""`compare both`, small: what it finds, writes and refuses."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from recpress.modules.config import ALSConfig
from recpress.trainer.compare.both import compare_both
from recpress.trainer.compare.both_result import format_both_table
from recpress.trainer.config import EvaluationConfig, OptimizerConfig
from tests.ranks import run_on_ranks
from tests.trainer.compare.configs import both_config


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
