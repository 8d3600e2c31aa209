"""The parts that all results of comparisons share."""

import json
import math

from recpress.data.dataset.log import open_log
from recpress.data.synthetic.interactions import synth
from recpress.trainer.compare.result import Result, run_facts, seeds_caption
from tests.trainer.compare.configs import LOG, hash_config


def test_the_facts_of_a_run_name_the_log_and_all_settings(tmp_path):
    log = open_log(str(synth(LOG, tmp_path / "log")), None)
    facts = run_facts("Title", hash_config(tmp_path / "out", data=str(tmp_path / "log"), seeds=(3, 4)), log, ranks=2)
    result = Result(**facts, warnings=("careful",), notes=("measured so",))
    assert result.title == "Title on log"
    assert result.data["train examples"] == log.train.num_rows
    assert (result.data["seeds"], result.data["ranks"]) == ("3, 4", 2)
    assert result.config["share"] == 0.15
    assert run_facts("Title", hash_config(tmp_path), log)["title"] == "Title on a synthetic log"
    report = result.to_report([], [])
    assert (report.warnings, report.notes, report.data) == (result.warnings, result.notes, result.data)


def test_the_json_has_null_for_nan(tmp_path):
    Result(title="T", data={"a": math.nan}).save(tmp_path / "result.json")
    saved = json.loads((tmp_path / "result.json").read_text())
    assert (saved["title"], saved["data"]) == ("T", {"a": None})


def test_the_caption_says_what_the_figures_are():
    assert seeds_caption(1) == "One seed. "
    assert "over 3 seeds" in seeds_caption(3)
