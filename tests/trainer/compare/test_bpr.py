"""The peer by the library implicit."""

import math
from dataclasses import replace

import pytest

from recpress.data.dataset.log import open_log
from recpress.data.synthetic.interactions import synth
from recpress.trainer.compare import bpr
from recpress.trainer.compare.bpr import BPRMethod
from recpress.trainer.distributed.process_group import process_group
from tests.trainer.compare.configs import cadc_config


def test_a_missing_library_is_said_and_the_rest_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(bpr, "installed", lambda: False)
    config = replace(cadc_config(tmp_path), seeds=(0,))
    with process_group("cpu"):
        synth(config.synth, tmp_path / "log")
        peer = BPRMethod(config, tmp_path, open_log(str(tmp_path / "log"), None))
        assert not peer.available
        row = peer.result()
    assert "not installed" in row.name
    assert math.isnan(row.mean("HR@10"))


def test_bpr_beats_popularity(tmp_path):
    pytest.importorskip("implicit")
    config = cadc_config(tmp_path)
    with process_group("cpu"):
        synth(config.synth, tmp_path / "log")
        log = open_log(str(tmp_path / "log"), None)
        peer = BPRMethod(config, tmp_path, log)
        peer.trial(log, 1, seed=0)
        assert len(peer.curve) == 10
        assert peer.final(seed=0)[0].metrics["HR@10"] > 0.4
