"""`recpress export` of two-tower networks: the programs give the trainer's vectors, in a process without recpress."""

import json
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from recpress.data.dataset.log import open_log
from recpress.data.sampling.histories import latest_items
from recpress.modules.config import HashConfig
from recpress.modules.hashing.methods import build_map
from recpress.modules.hashing.table_stats import TableStats
from recpress.trainer.cli import main
from recpress.trainer.config import EvaluationConfig
from recpress.trainer.export.config import ExportConfig
from recpress.trainer.export.loader import load
from recpress.trainer.export.stage import export
from recpress.trainer.plan.config import PlanConfig
from recpress.trainer.plan.stage import plan
from recpress.trainer.train.stage import train
from tests.ranks import run_on_ranks
from tests.trainer.export.models import (
    ITEMS,
    USERS,
    random_map,
    trainer_vectors,
    two_tower,
    write_factors,
    write_log,
    write_maps,
)

pytestmark = pytest.mark.slow
SIDES = ("user", "item")


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    return write_log(tmp_path_factory.mktemp("log"))


@pytest.fixture(scope="module")
def factors(log, tmp_path_factory):
    return write_factors(log, tmp_path_factory.mktemp("factors") / "factors")


def featured(log, out, factors):
    """Frozen tables and small trainable ones, log counts, a category, a number and a list."""
    features = {"user_features": ("city", "age"), "item_features": ("tags",)}
    return two_tower(log, out, factors, "frozen+residual", **features)


@pytest.fixture(scope="module")
def model(log, factors, tmp_path_factory):
    out = tmp_path_factory.mktemp("model") / "model"
    train(featured(log, out, factors))
    return str(out)


@pytest.fixture(scope="module")
def exported(model, tmp_path_factory):
    out = tmp_path_factory.mktemp("export") / "export"
    export(ExportConfig(model=model, out=str(out), storage="fp32", inline_mb=0.005))  # some tensors are files
    return out


def distance(found, expected):
    """Largest difference, relative to the largest vector."""
    return float((found - expected).abs().max() / expected.abs().max())


def exported_vectors(folder):
    ids = {"user": USERS, "item": ITEMS}
    return {side: load(folder, side)(torch.arange(ids[side])) for side in SIDES}


def assert_same(folder, model, log, tolerance=1e-5):
    expected, found = trainer_vectors(model, log), exported_vectors(folder)
    for side in SIDES:
        assert distance(found[side], expected[side]) < tolerance


def test_fp32_programs_give_the_vectors_of_the_trainer(exported, model, log):
    assert_same(exported, model, log)
    tables = json.loads((exported / "manifest.json").read_text())["programs"]["user"]["tables"]
    assert {name: table["storage"] for name, table in tables.items()} == {
        "user": "fp32",
        "user_plus": "fp32",
        "user_city": "fp32",
    }


@pytest.mark.parametrize("history", ["add", "only"])
def test_the_program_of_users_takes_their_items(history, log, tmp_path):
    config = two_tower(log, tmp_path / "model", None, "random", user_features=("city", "age"))
    tables = replace(config.model.tables, history=history, history_length=9)
    train(replace(config, model=replace(config.model, tables=tables)))
    folder = tmp_path / "export"
    export(ExportConfig(model=config.out, out=str(folder), storage="fp32", index="usearch"))
    assert main(["export", "--check", str(folder)]) == 0
    user, users = load(folder, "user"), torch.arange(USERS)
    for length in (9, 400):  # the program takes the last 9 itself
        lists = latest_items(open_log(log), length).take(users.numpy())
        found = user(users, torch.from_numpy(lists.values).long(), torch.from_numpy(lists.lengths))
        assert distance(found, trainer_vectors(config.out, log)["user"]) < 1e-5
    new = user(torch.tensor([-1, -1]), torch.tensor([3, ITEMS, -5, 3, 4]), torch.tensor([3, 2]))  # of a new user
    same = user(torch.tensor([-1, -1]), torch.tensor([3, 3, 4]), torch.tensor([1, 2]))  # unknown items are zeros
    torch.testing.assert_close(new, same)
    assert (new[0] - new[1]).abs().max() > 0


@pytest.mark.parametrize(("storage", "tolerance"), [("fp16", 1e-3), ("int8", 1e-2), ("int4", 0.15)])
def test_large_rows_in_fewer_bits_are_files_and_give_nearly_the_same_vectors(
    exported, model, storage, tolerance, tmp_path, capsys
):
    export(ExportConfig(model=model, out=str(tmp_path / "small"), storage=storage, inline_mb=0, index="none"))
    found, expected = exported_vectors(tmp_path / "small"), exported_vectors(exported)
    for side in SIDES:
        assert 0 < distance(found[side], expected[side]) < tolerance
    assert len(list((tmp_path / "small" / "rows").iterdir())) > 6
    golden = [torch.load(folder / "golden.pt", weights_only=True) for folder in (tmp_path / "small", exported)]
    programs = json.loads((tmp_path / "small" / "manifest.json").read_text())["programs"]
    for side in SIDES:
        loss = distance(golden[0][side]["output"], golden[1][side]["output"])
        assert programs[side]["storage_error"] == pytest.approx(loss, rel=1e-3)
    assert f"{programs['user']['storage_error']:.2g}" in capsys.readouterr().out
    state = torch.export.load(tmp_path / "small" / "item.pt2").state_dict
    assert not [name for name in state if ".rows." in name]


def test_unknown_ids_get_the_vector_of_a_row_of_zeros(exported):
    item = load(exported, "item")
    found = item(torch.tensor([ITEMS, -1, 10**12]))
    assert torch.isfinite(found).all()
    assert (found == found[0]).all()
    assert not torch.equal(found[0], item(torch.tensor([0]))[0])


def test_a_batch_may_have_any_size_up_to_the_largest(exported):
    user = load(exported, "user")
    every = user(torch.arange(USERS))
    assert user(torch.arange(0)).shape == (0, every.shape[1])
    assert distance(user(torch.arange(1)), every[:1]) < 1e-6
    with pytest.raises(ValueError, match="at most 1048576"):
        user(torch.zeros(2**20 + 1, dtype=torch.int64))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((torch.zeros(3, dtype=torch.int32),), "expected a tensor of int64"),
        ((torch.zeros(3, 1, dtype=torch.int64),), r"shape \(3, 1\), expected \(batch,\)"),
        ((torch.zeros(3), torch.zeros(3)), "2 inputs, expected user"),
        (({"users": torch.zeros(3)},), "'user' is missing"),
    ],
)
def test_inputs_that_do_not_fit_are_refused_by_name(exported, given, message):
    with pytest.raises(ValueError, match=message):
        load(exported, "user")(*given)


def test_the_golden_batch_is_replayed_without_recpress(exported, capfd):
    assert main(["export", "--check", str(exported)]) == 0
    assert "user: largest difference 0" in capfd.readouterr().out


def test_a_changed_file_is_found_by_the_check(model, tmp_path, capfd):
    out = tmp_path / "export"
    export(ExportConfig(model=model, out=str(out), index="none"))
    golden = torch.load(out / "golden.pt", weights_only=True)
    golden["item"]["output"] += 1
    torch.save(golden, out / "golden.pt")
    assert main(["export", "--check", str(out)]) == 2
    assert "golden.pt: missing or changed since the export" in capfd.readouterr().err


def test_vocabularies_and_item_vectors_have_raw_ids(exported, log):
    manifest = json.loads((exported / "manifest.json").read_text())
    users = pq.read_table(exported / manifest["vocabularies"]["user_id"]["file"])
    assert users["id"].to_pylist() == list(range(USERS))
    assert set(users["raw"].to_pylist()) == {f"u{k}" for k in range(USERS)}
    items = pq.read_table(exported / manifest["items"]["file"])
    assert sorted(items["raw"].to_pylist()) == [7 * k for k in range(ITEMS)]
    assert items["raw"].to_pylist() == open_log(log).vocabulary("item")["raw"].to_pylist()
    vectors = torch.tensor(items["vector"].to_pylist())
    assert distance(vectors, exported_vectors(exported)["item"]) < 1e-6


def test_plan_predicts_the_size(log, factors, tmp_path):
    maps = {"user": random_map(USERS, 30, 2, weighted=True), "item": random_map(ITEMS, 40)}
    for hashed in (None, write_maps(log, tmp_path / "maps", maps)):
        run = two_tower(log, tmp_path / f"model{hashed is None}", factors, "frozen+residual", hash=hashed)
        train(run)
        out = tmp_path / f"export{hashed is None}"
        export(ExportConfig(model=run.out, out=str(out), index="none"))
        planned = plan(PlanConfig(data=log, factors=factors, hash=hashed, model=run.model))["export_bytes"]
        programs = json.loads((out / "manifest.json").read_text())["programs"].values()
        towers = torch.load(Path(run.out) / "weights" / "dense.pt", weights_only=True)
        dense = sum(tensor.nbytes for name, tensor in towers.items() if "_counts." not in name)
        assert planned == pytest.approx(dense + sum(program["bytes"] for program in programs), rel=0.05)


def test_random_tables_and_multilayer_towers(log, tmp_path):
    train(two_tower(log, tmp_path / "model", None, "random"))
    export(ExportConfig(model=str(tmp_path / "model"), out=str(tmp_path / "export"), storage="fp32", index="none"))
    assert_same(tmp_path / "export", str(tmp_path / "model"), log)


def test_maps_with_and_without_weights_and_formulas(log, factors, tmp_path):
    computed = build_map(TableStats(name="item", num_ids=ITEMS), 40, HashConfig(method="double", seed=9))
    maps = {"user": random_map(USERS, 30, 2, weighted=True), "item": computed}
    hashed = write_maps(log, tmp_path / "maps", maps)
    train(two_tower(log, tmp_path / "model", factors, "frozen", hash=hashed, storage="fp16"))
    export(ExportConfig(model=str(tmp_path / "model"), out=str(tmp_path / "export"), storage="fp32", index="none"))
    assert_same(tmp_path / "export", str(tmp_path / "model"), log)
    user = load(tmp_path / "export", "user")
    unknown = user(torch.tensor([USERS, USERS + 1, -5]))
    assert not torch.equal(unknown[0], unknown[1])  # hashed, each to its own rows
    tables = json.loads((tmp_path / "export" / "manifest.json").read_text())["programs"]
    assert tables["user"]["tables"]["user"] == {"storage": "fp16", "rows": 30, "dim": 12, "bytes": 31 * 24}


def _train(log, out, factors):
    train(two_tower(log, Path(out), factors, "frozen+residual"))


def test_a_model_of_two_ranks_is_joined_from_their_shards(log, factors, tmp_path):
    model = str(tmp_path / "model")
    run_on_ranks(_train, 2, log, model, factors)
    assert len(list(Path(model).glob("weights/tables/*.user.*/*.npy"))) == 2
    export(ExportConfig(model=model, out=str(tmp_path / "export"), storage="fp32", index="none"))
    assert_same(tmp_path / "export", model, log)


def test_the_factorization_s_own_ranking_is_exported_as_its_rows(log, factors, tmp_path):
    train(two_tower(log, tmp_path / "model", factors, "frozen", evaluation=EvaluationConfig()))
    export(ExportConfig(model=str(tmp_path / "model"), out=str(tmp_path / "of_model"), storage="fp32"))
    export(ExportConfig(model=factors, out=str(tmp_path / "of_factors"), storage="fp32"))
    assert json.loads((tmp_path / "of_model" / "manifest.json").read_text())["model"]["fallback"]
    of_model, of_factors = exported_vectors(tmp_path / "of_model"), exported_vectors(tmp_path / "of_factors")
    expected = trainer_vectors(str(tmp_path / "model"), log)
    scores = expected["user"] @ expected["item"].T
    for found in (of_model, of_factors):
        assert distance(found["user"] @ found["item"].T, scores) < 1e-5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "MODEL"], "out: missing"),
        (["--check", "MODEL"], "expected kind 'export'"),
        (["--check", "EXPORT", "--out", "x"], "expected no --model"),
        (["--model", "LOG", "--out", "OUT"], "an artifact of kind 'log'; expected a model"),
        (["--model", "nowhere", "--out", "OUT"], "nowhere: no manifest.json"),
        (["--model", "MODEL", "--out", "EXPORT"], "exists already"),
        (["--model", "MODEL", "--out", "OUT", "--index-recall", "2"], "index_recall"),
        (["--model", "MODEL", "--out", "OUT", "--data", "nolog"], "nolog: no such file"),
        (["--model", "MODEL", "--out", "OUT", "--storage", "int2"], "storage"),
    ],
)
def test_what_cannot_be_exported_is_one_line(arguments, message, model, exported, log, tmp_path, capfd):
    places = {"MODEL": model, "EXPORT": str(exported), "LOG": log, "OUT": str(tmp_path / "out")}
    assert main(["export", *(places.get(word, word) for word in arguments)]) == 2
    said = capfd.readouterr().err.strip()
    assert message in said
    assert len(said.splitlines()) == 1
    assert not (tmp_path / "out").exists()
