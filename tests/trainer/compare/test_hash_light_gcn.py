"""`compare hash` with LightGCN: the table, and a comparison that resumes after a stop."""

import json
from dataclasses import replace

import pytest

from recpress.data.errors import InputError
from recpress.trainer.compare.config import LightGCNConfig
from recpress.trainer.compare.hash import compare_hash
from recpress.trainer.compare.hash_light_gcn import LightGCNBackbone, checkpoint_folder
from recpress.trainer.compare.hash_result import format_hash_tables
from recpress.trainer.compare.light_gcn import LightGCNTraining
from tests.trainer.compare.configs import hash_config

pytestmark = pytest.mark.slow  # trains models

LIGHT = LightGCNConfig(dim=16, batch_size=2048, learning_rate=0.02, init_std=0.1, epochs=30, patience=3)


def config(out, **more):
    given = {"backbone": "lightgcn", "lightgcn": LIGHT, "methods": ("modulo", "learned-2"), "trials": 1}
    return hash_config(out, **given | {"equal_bytes": False} | more)


class Stop(Exception):
    pass


def counted(patch, stop_at=0):
    """Count evaluations; the `stop_at`-th one raises Stop."""
    calls = []
    evaluate = LightGCNTraining._evaluate

    def count(training, *args):
        calls.append(training)
        if len(calls) == stop_at:
            raise Stop
        evaluate(training, *args)

    patch.setattr(LightGCNTraining, "_evaluate", count)
    return calls


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    folder = tmp_path_factory.mktemp("straight")
    with pytest.MonkeyPatch.context() as patch:
        calls = counted(patch)
        result = compare_hash(config(folder / "out"))
    return folder, result, calls


def test_the_table_has_the_vectors_of_light_gcn(straight):
    folder, result, _ = straight
    assert [method.key for method in result.methods] == ["full", "modulo", "learned-2"]
    for method in result.methods:
        assert method.row_bytes == 4 * 16 * method.rows
        assert len(method.train_seconds) == 1
    recall = {method.key: method.mean("Recall@10") for method in result.methods}
    assert recall["full"] > 1.2 * result.popularity["Recall@10"]
    assert recall["learned-2"] > recall["modulo"]
    assert "sweeps" not in result.method("modulo").setting
    assert result.bytes is None
    text, page = format_hash_tables(result), (folder / "out" / "report.html").read_text()
    assert "Equal rows" in text
    assert "Equal bytes" not in text
    assert "LightGCN (He et al. 2020)" in page
    saved = json.loads((folder / "out" / "result.json").read_text())
    assert saved["bytes"] is None
    assert saved["data"]["backbone"] == "lightgcn"
    assert [path.name for path in folder.iterdir()] == ["out"]  # no checkpoints are left


def test_the_trial_and_the_test_run_of_one_seed_are_one_training(straight):
    _, _, calls = straight
    assert len({id(training) for training in calls}) == 3  # full and two methods
    assert len(calls) <= 9


def test_a_stopped_comparison_resumes_and_finds_the_same(straight, tmp_path):
    _, result, calls = straight
    with pytest.MonkeyPatch.context() as patch:
        counted(patch, stop_at=5)
        with pytest.raises(Stop):
            compare_hash(config(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    assert len(list((tmp_path / "out.checkpoints").iterdir())) == 2
    with pytest.MonkeyPatch.context() as patch:
        again = counted(patch)
        resumed = compare_hash(config(tmp_path / "out"))
    assert len(again) == len(calls) - 4
    for method in result.methods:
        assert resumed.method(method.key).metrics == method.metrics


def test_other_settings_do_not_resume(tmp_path):
    first, second = (LightGCNBackbone(config(tmp_path / "out", lightgcn=of), tmp_path / str(of.dim)) for of in (
        LIGHT, replace(LIGHT, dim=8)
    ))  # fmt: skip
    assert first._about != second._about
    longer = LightGCNBackbone(config(tmp_path / "out", lightgcn=replace(LIGHT, epochs=60, patience=9)), tmp_path / "9")
    assert longer._about == first._about  # it trains on
    assert second.row_bytes == 32


def test_checkpoints_need_a_folder_of_this_machine(tmp_path):
    with pytest.raises(InputError, match="expected a folder on this machine"):
        checkpoint_folder(config("s3://bucket/out"))
    assert checkpoint_folder(replace(config("s3://bucket/out"), checkpoints=str(tmp_path))) == tmp_path
