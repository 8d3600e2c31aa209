"""`recpress plan`: formulas against known answers and real modules, the search, bad input."""

import json

from recpress.trainer.cli import main
from recpress.trainer.plan.config import ClusterConfig
from recpress.trainer.plan.stage import plan
from tests.trainer.plan.jobs import config

GIB = 1 << 30


def test_what_does_not_fit_is_told(capsys):
    result = plan(config(users=1_000_000_000, cluster=ClusterConfig(nodes=1, ranks_per_node=1)))
    assert not result["fits"]
    assert "DOES NOT FIT: TorchRec's planner finds no plan" in capsys.readouterr().out
    small = {name: row["smallest"]["ranks"] for name, row in result["variants"].items()}
    assert small["frozen int8"] < small["frozen fp32"] <= small["trainable"]
    assert small["learned hash 25 %, frozen int8"] < small["frozen int8"]


def test_a_billion_users_on_64_gpus(tmp_path):
    out = tmp_path / "plan.json"
    result = plan(config(users=1_000_000_000, json=str(out), cluster=ClusterConfig(nodes=8)))
    assert json.loads(out.read_text())["peaks"] == result["peaks"]
    assert len(result["variants"]) == 6
    maps = result["variants"]["learned hash 25 %, frozen fp32"]["maps_per_rank"]
    assert maps == 1_000_100_000 * 5  # 4 bytes of map and 1 of log count, on every rank


def test_on_the_command_line(tmp_path, capsys):
    file = tmp_path / "train.toml"
    file.write_text('data = ""\nseed = 3\nepochs = 2\n[model.tables]\nstorage = "int8"\n')
    options = ["--users", "1000000", "--items", "1000", "--dim", "64", "--cluster.nodes", "2", "--no-compare"]
    assert main(["plan", "--config", str(file), *options]) == 0
    out = capsys.readouterr().out
    assert "2 x 8 = 16 GPUs" in out
    assert "int8" in out
    assert "not counted: 8 bytes per interaction" in out
    assert main(["plan", "--users", "1000", "--items", "500", "--dim", "8"]) == 0  # compares variants
    assert "frozen int8" in capsys.readouterr().out
    assert main(["plan", "--users", "5", "--items", "5", "--cluster.nodes", "0"]) == 2
    assert "nodes is 0, expected at least 1" in capsys.readouterr().err
