"""`recommend` on a log of raw ids: the metrics of `evaluate`, on any number of ranks; kill and resume; bad input."""

import bz2
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from recpress.data.config import IngestConfig, NegativesConfig, StreamConfig, SynthConfig
from recpress.data.dataset.log import open_log
from recpress.data.errors import InputError
from recpress.data.ingest.convert import ingest
from recpress.data.synthetic.interactions import synth
from recpress.modules.config import ALSConfig, LossConfig, TablesConfig, TowersConfig, TwoTowerConfig
from recpress.trainer.cli import main
from recpress.trainer.config import EvaluationConfig, TrainConfig
from recpress.trainer.evaluate import metrics as ranking_metrics
from recpress.trainer.evaluate.config import EvaluateConfig
from recpress.trainer.evaluate.stage import evaluate
from recpress.trainer.export.config import ExportConfig
from recpress.trainer.export.stage import export
from recpress.trainer.factorize.config import FactorizeConfig
from recpress.trainer.factorize.stage import factorize
from recpress.trainer.recommend.config import RecommendConfig
from recpress.trainer.recommend.parts import part_name
from recpress.trainer.recommend.stage import recommend
from recpress.trainer.train.stage import train
from tests.ranks import run_on_ranks

USERS, ITEMS, K = 300, 200, 60


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    """300 users, named u7, u8, ..., and 200 items, whose raw ids are not their dense ids. One test row per user."""
    folder = tmp_path_factory.mktemp("log")
    made = open_log(synth(SynthConfig(users=USERS, items=ITEMS, rows=6_000, tastes=8, negatives=20), folder / "synth"))
    rows = pa.concat_tables(
        table.append_column("split", pa.repeat(split, len(table)))
        for split in ("train", "test")
        for table in [pq.read_table(folder / "synth" / split, columns=["user_id", "item_id"])]
    ).to_pydict()
    rows["user_id"] = [f"u{user + 7}" for user in rows["user_id"]]
    rows["item_id"] = [1_000_000 - 3 * item for item in rows["item_id"]]
    assert made.num_users == USERS
    pq.write_table(pa.table(rows), folder / "raw.parquet")
    source = IngestConfig(input=str(folder / "raw.parquet"), split_column="split")
    return str(ingest(source, folder / "log"))


@pytest.fixture(scope="module")
def factors(log, tmp_path_factory):
    out = str(tmp_path_factory.mktemp("factors") / "factors")
    factorize(FactorizeConfig(data=log, out=out, als=ALSConfig(factors=16, sweeps=4, auto=False)))
    return out


@pytest.fixture(scope="module")
def model(log, factors, tmp_path_factory):
    out = str(tmp_path_factory.mktemp("model") / "model")
    network = TwoTowerConfig(
        tables=TablesConfig(strategy="frozen"),
        towers=TowersConfig(kind="residual", hidden=(16,), dim=16),
        loss=LossConfig(kind="softmax"),
    )
    train(
        TrainConfig(
            data=log,
            out=out,
            factors=factors,
            model=network,
            stream=StreamConfig(batch_size=256),
            negatives=NegativesConfig(count=32, shared=True),
            epochs=1,
            tensorboard=False,
        )
    )
    return out


@pytest.fixture(scope="module")
def best(factors, tmp_path_factory):
    """The recommendations of the factors, on one rank."""
    out = str(tmp_path_factory.mktemp("best") / "best")
    recommend(settings(factors, out))
    return out


def settings(model, out, **changes):
    return RecommendConfig(**{"model": str(model), "out": str(out), "k": K, "users_per_part": 64, **changes})


def read(out):
    return pq.read_table(Path(out) / "recommendations").to_pydict()


def dense(log, side, raw):
    place = {value: k for k, value in enumerate(log.vocabulary(side)["raw"].to_pylist())}
    return [place[value] for value in raw]


def metrics_of(out, path, k):
    """HR, NDCG, Recall and UncappedRecall at k of the test rows, from the Parquet files alone."""
    log, found = open_log(path), read(out)
    rows = {part: pq.read_table(Path(path) / part).select(["user_id", "item_id"]) for part in ("train", "test")}
    pairs = {
        part: set(zip(*(column.to_pylist() for column in table.columns), strict=True)) for part, table in rows.items()
    }
    lists = dict(
        zip(
            dense(log, "user", found["user"]),
            (
                (dense(log, "item", items), scores)
                for items, scores in zip(found["items"], found["scores"], strict=True)
            ),
            strict=True,
        )
    )
    targets = {}
    for user, item in sorted(pairs["test"] - pairs["train"]):
        targets.setdefault(user, set()).add(item)
    positions, of_row = [], []
    for row, (user, held_out) in enumerate(targets.items()):
        items, scores = lists[user]
        own = sorted(score for item, score in zip(items, scores, strict=True) if item in held_out)[::-1]
        others = [score for item, score in zip(items, scores, strict=True) if item not in held_out]
        reached = [sum(other >= score for other in others) + place + 1 for place, score in enumerate(own)]
        positions += reached + [10**6] * (len(held_out) - len(own))
        of_row += [row] * len(held_out)
    given = torch.tensor(positions), torch.tensor(of_row), len(targets), k
    metrics = {
        "HR": ranking_metrics.hit_rate,
        "NDCG": ranking_metrics.ndcg,
        "Recall": ranking_metrics.recall,
        "UncappedRecall": ranking_metrics.uncapped_recall,
    }
    unit = 1 << 32  # `evaluate` adds integers
    return {
        f"{name}@{k}": int((metric(*given) * unit).round().long().sum()) / (len(targets) * unit)
        for name, metric in metrics.items()
    }


@pytest.mark.parametrize("kind", ["factors", "model"])
def test_the_metrics_are_those_of_evaluate(kind, log, factors, model, best, tmp_path):
    made = best if kind == "factors" else tmp_path / "best"
    if kind == "model":
        recommend(settings(model, made))
    ranked = EvaluationConfig(protocol="full", k=(10,))
    wanted = evaluate(EvaluateConfig(data=log, model=factors if kind == "factors" else model, evaluation=ranked))
    found = metrics_of(made, log, 10)
    assert 0 < found["HR@10"] < 1
    assert found == {name: wanted[name] for name in found}


def test_what_the_output_has(log, best):
    manifest = json.loads((Path(best) / "manifest.json").read_text())
    assert manifest["kind"] == "recommendations"
    assert manifest["users"] == {"given": USERS, "written": USERS, "short": 0, "empty": 0}
    assert manifest["parts"] == 5
    assert [file["name"] for file in manifest["contents"]] == [*(part_name(k) for k in range(5)), "run.json"]
    schema = pq.read_schema(Path(best) / part_name(0))
    assert [field.name for field in schema] == ["user", "items", "scores"]
    assert (schema.field("items").type.value_type, schema.field("scores").type.value_type) == (pa.int64(), pa.float32())
    found, opened = read(best), open_log(log)
    assert found["user"] == opened.vocabulary("user")["raw"].to_pylist()
    seen = pq.read_table(Path(log) / "train").select(["user_id", "item_id"])
    seen = set(zip(*(column.to_pylist() for column in seen.columns), strict=True))
    for user, items, scores in zip(range(USERS), found["items"], found["scores"], strict=True):
        assert len(items) == len(set(items)) == K
        assert scores == sorted(scores, reverse=True)
        assert not any((user, item) in seen for item in dense(opened, "item", items))


def test_two_ranks_write_the_same(log, factors, model, best, tmp_path):
    run_on_ranks(recommend, 2, settings(factors, tmp_path / "two"))
    assert read(tmp_path / "two") == read(best)


def test_seen_items_may_be_included_and_short_lists_are_short(log, factors, tmp_path):
    recommend(settings(factors, tmp_path / "all", k=ITEMS, exclude_seen=False))
    recommend(settings(factors, tmp_path / "rest", k=ITEMS))
    everything, rest = read(tmp_path / "all"), read(tmp_path / "rest")
    counts = np.bincount(pq.read_table(Path(log) / "train")["user_id"].to_numpy(), minlength=USERS)
    assert all(len(items) == ITEMS for items in everything["items"])
    assert [len(items) for items in rest["items"]] == (ITEMS - counts).tolist()


def test_users_with_short_and_empty_lists_are_counted(tmp_path, capsys):
    """Of 6 items, user 0 has seen all, user 1 five."""
    rows = [(0, item) for item in range(6)] + [(1, item) for item in range(5)] + [(2, 0), (2, 3), (3, 1)]
    pq.write_table(pa.table(dict(zip(("user_id", "item_id"), zip(*rows, strict=True), strict=True))), tmp_path / "a.pq")
    log, factors, out = str(tmp_path / "log"), str(tmp_path / "factors"), tmp_path / "best"
    assert main(["ingest", "--input", str(tmp_path / "a.pq"), "--out", log]) == 0
    factorize(FactorizeConfig(data=log, out=factors, als=ALSConfig(factors=2, sweeps=2, auto=False)))
    capsys.readouterr()
    command = ["recommend", "--model", factors, "--k", "3", "--users-per-part", "1", "--out"]
    assert main([*command, str(out)]) == 0
    assert "users with fewer items: 2 (1 with none)" in capsys.readouterr().out
    assert json.loads((out / "manifest.json").read_text())["users"] == {
        "given": 4,
        "written": 4,
        "short": 2,
        "empty": 1,
    }
    assert [len(items) for items in read(out)["items"]] == [0, 1, 3, 3]
    stopped = tmp_path / "again"  # before its last part
    shutil.copytree(out, f"{stopped}.unfinished")
    (tmp_path / "again.unfinished" / part_name(3)).unlink()
    run_on_ranks(recommend, 2, settings(factors, stopped, k=3, users_per_part=1))
    assert json.loads((stopped / "manifest.json").read_text())["users"]["short"] == 2


KILLED = """
import os, signal, sys
from recpress.trainer.cli import main
from recpress.trainer.recommend import parts
write = parts.pq.write_table
def killed(table, path, **options):
    write(table, path, **options)
    if "part-00002" in str(path):
        os.truncate(path, os.path.getsize(path) // 2)
        os.kill(os.getpid(), signal.SIGKILL)
parts.pq.write_table = killed
sys.exit(main(sys.argv[1:]))
"""


def test_a_killed_run_resumes_on_other_ranks(log, factors, best, tmp_path, capsys):
    out, folder = tmp_path / "best", tmp_path / "best.unfinished"
    command = ["recommend", "--model", factors, "--out", str(out), "--k", str(K), "--users-per-part", "64"]
    process = subprocess.run([sys.executable, "-c", KILLED, *command], check=False)
    assert process.returncode == -signal.SIGKILL
    assert not out.exists()
    first, second = (folder / part_name(k) for k in (0, 1))
    second.write_bytes(second.read_bytes()[:-9])  # a machine that lost power may leave this
    before = os.stat(first).st_mtime_ns
    for changed, name in (
        (["--k", "10"], "k"),
        (["--no-exclude-seen"], "exclude_seen"),
        (["--users-per-part", "8"], "users_per_part"),
    ):
        assert main([*command, *changed]) == 2
        assert f"{name}: " in capsys.readouterr().err
    run_on_ranks(recommend, 2, settings(factors, out))
    assert read(out) == read(best)
    assert os.stat(out / part_name(0)).st_mtime_ns == before
    assert not folder.exists()
    assert sorted(os.listdir(tmp_path)) == ["best"]
    names = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    assert names == {*(part_name(k) for k in range(5)), "run.json", "manifest.json"}
    assert main(command) == 2
    assert "exists already" in capsys.readouterr().err
    assert main([*command, "--overwrite", "--k", "3"]) == 0
    assert {len(items) for items in read(out)["items"]} == {3}


def test_a_run_does_not_resume_with_another_model_or_other_users(log, factors, tmp_path, capsys):
    out = tmp_path / "best"
    command = ["recommend", "--model", factors, "--out", str(out), "--k", str(K), "--users-per-part", "64"]
    assert subprocess.run([sys.executable, "-c", KILLED, *command], check=False).returncode == -signal.SIGKILL
    other = str(tmp_path / "factors")
    factorize(FactorizeConfig(data=log, out=other, als=ALSConfig(factors=16, sweeps=2, auto=False)))
    pq.write_table(pa.table({"user": ["u9", "u8"]}), tmp_path / "users.parquet")
    for changed, name in (["--model", other], "model"), (["--data", str(tmp_path / "users.parquet")], "users"):
        assert main([*command, *changed]) == 2
        assert f" ({name}: " in capsys.readouterr().err
    assert main([*command, "--model", other, "--overwrite"]) == 0
    assert json.loads((out / "manifest.json").read_text())["model"]["path"] == other


def test_users_of_a_file(factors, best, tmp_path, caplog):
    everyone = dict(zip(*(read(best)[name] for name in ("user", "items")), strict=True))
    wanted = ["u99", "u8", "nobody", "u200", "u8"]
    pq.write_table(pa.table({"user": wanted}), tmp_path / "users.parquet")
    (tmp_path / "users.csv").write_text("age,user_id\n" + "".join(f"1,{user}\n" for user in wanted))
    for name in ("users.parquet", "users.csv"):
        given = {"data": str(tmp_path / name), "users_per_part": 2}
        with pytest.raises(InputError, match=r"1 of its 4 users are not in .*'nobody'.*--on-unknown skip"):
            recommend(settings(factors, tmp_path / "out", **given))
        out = tmp_path / f"{name}-best"
        recommend(settings(factors, out, **given, on_unknown="skip"))
        assert read(out)["user"] == ["u99", "u8", "u200"]
        assert read(out)["items"] == [everyone[user] for user in read(out)["user"]]
        assert pq.read_table(out / "unknown_users.parquet").to_pydict() == {"user": ["nobody"]}
        counts = json.loads((out / "manifest.json").read_text())["users"]
        assert counts == {"given": 5, "repeated": 1, "unknown": 1, "written": 3, "short": 0, "empty": 0}
    assert sorted(path.name for path in tmp_path.iterdir() if "out" in path.name) == []


def test_folders_of_users(factors, best, tmp_path):
    """A folder is not taken for a log: Spark names it `x.parquet`; ids may be in any of the types that ingest reads."""
    everyone = dict(zip(*(read(best)[name] for name in ("user", "items")), strict=True))
    for name in ("users.parquet", "users", "text"):
        (tmp_path / name).mkdir()
    for folder in ("users.parquet", "users"):
        (tmp_path / folder / "_SUCCESS").write_text("")
        for part, users in enumerate([["u99"], ["u8", "u200"]]):
            pq.write_table(pa.table({"user": pa.array(users, pa.string_view())}), tmp_path / folder / f"{part}.parquet")
    (tmp_path / "text" / "a.csv").write_bytes(b"\xef\xbb\xbfuser_id;age\r\nu99;3\r\n")
    (tmp_path / "text" / "b.csv.bz2").write_bytes(bz2.compress(b'user_id\n"u8"\nu200\n'))
    for name in ("users.parquet", "users", "text"):
        recommend(settings(factors, tmp_path / f"{name}-best", data=str(tmp_path / name)))
        found = read(tmp_path / f"{name}-best")
        assert found["user"] == ["u99", "u8", "u200"]
        assert found["items"] == [everyone[user] for user in found["user"]]


def test_bad_input_is_one_line_and_writes_nothing(log, factors, tmp_path, capsys):
    tables = {
        "empty": {"user": pa.array([], pa.string())},
        "null": {"user": ["u8", None]},
        "floats": {"user": [1.5]},
        "none": {"user": ["x", "y"]},
        "structs": {"user": [{"id": "u8"}]},
        "two": {"a": ["u8"], "b": ["u9"]},
    }
    for name, columns in tables.items():
        pq.write_table(pa.table(columns), tmp_path / f"{name}.parquet")
    (tmp_path / "headless.csv").write_text("u8\nu9\n")
    (tmp_path / "torn.parquet").write_bytes(b"PAR1 no")
    (tmp_path / "users.json").write_text('["u8"]')
    (tmp_path / "pages").mkdir()
    (tmp_path / "pages/1.csv").write_text("a,b\nu8,1\n")
    (tmp_path / "file").write_text("")
    (tmp_path / "left.unfinished").mkdir()
    incomplete, future = tmp_path / "incomplete", tmp_path / "future"
    for folder in (incomplete, future):
        shutil.copytree(factors, folder)
    (incomplete / "manifest.json").unlink()
    manifest = json.loads((future / "manifest.json").read_text())
    (future / "manifest.json").write_text(json.dumps({**manifest, "version": 99}))
    missing = tmp_path / "missing"
    shutil.copytree(factors, missing)
    (missing / "manifest.json").write_text(json.dumps({**manifest, "log": {**manifest["log"], "path": "gone"}}))
    before = sorted(tmp_path.rglob("*"))
    cases = [
        (["--data", str(tmp_path / "empty.parquet")], "no users"),
        (["--data", str(tmp_path / "null.parquet")], "row 1: null"),
        (["--data", str(tmp_path / "structs.parquet")], "expected integers or strings"),
        (["--data", str(tmp_path / "users.json")], "expected users in Parquet or text"),
        (["--data", str(tmp_path / "pages")], "columns a, b; expected a single column"),
        (["--data", str(tmp_path / "floats.parquet")], "row 0: 1.5; expected an integer"),
        (["--data", str(tmp_path / "none.parquet")], "none of its 2 users"),
        (["--data", str(tmp_path / "two.parquet")], "single column of raw user ids"),
        (["--data", str(tmp_path / "headless.csv")], "expected a header"),
        (["--data", str(tmp_path / "torn.parquet")], "torn.parquet: cannot be read"),
        (["--data", str(tmp_path / "absent.csv")], "no such file"),
        (["--data", str(tmp_path / "absent")], "no such file or folder"),
        (["--k", str(ITEMS + 1)], f"at most {ITEMS}"),
        (["--k", "0"], "k is 0"),
        (["--model", str(incomplete)], "no manifest.json"),
        (["--model", str(future)], "format version 99"),
        (["--model", log], "kind 'log'"),
        (["--model", str(missing)], "--log"),
        (["--out", str(tmp_path / "file")], "exists already"),
        (["--out", str(tmp_path / "left")], "left.unfinished: exists"),
        (["--out", f"{log}/best"], "inside the artifact"),
    ]
    for arguments, words in cases:
        given = {"--model": factors, "--out": str(tmp_path / "best")} | dict(
            zip(arguments[::2], arguments[1::2], strict=True)
        )
        assert main(["recommend", *(word for pair in given.items() for word in pair)]) == 2, arguments
        error = capsys.readouterr().err
        assert words in error, (arguments, error)
        assert len([line for line in error.splitlines() if "error" in line.lower()]) == 1
        assert "Traceback" not in error
    assert sorted(tmp_path.rglob("*")) == before


def test_a_vector_that_is_not_finite_is_named_on_every_rank(log, factors, tmp_path):
    broken = tmp_path / "factors"
    shutil.copytree(factors, broken)
    users = np.load(broken / "user-00000-of-00001.npy")
    users[201, 3] = np.nan
    np.save(broken / "user-00000-of-00001.npy", users)
    with pytest.raises(InputError, match="user 201: its scores are not finite"):
        run_on_ranks(recommend, 2, settings(broken, tmp_path / "best", users_per_part=300))
    assert not (tmp_path / "best").exists()
    assert not (tmp_path / "best.unfinished").exists()


@pytest.fixture(scope="module")
def exports(factors, tmp_path_factory):
    """Exports of the factors, with an index by faiss and by usearch, and without."""
    folder = tmp_path_factory.mktemp("exports")
    for library in ("faiss", "usearch", "none"):
        export(ExportConfig(model=factors, out=str(folder / library), index=library))
    return folder


@pytest.mark.parametrize(("library", "ranks"), [("faiss", 1), ("usearch", 2)])
def test_an_index_proposes_items(library, ranks, factors, best, exports, tmp_path):
    """The index finds nearly all items; its quantized vectors only propose, so that scores are exact."""
    pytest.importorskip(library)
    out = tmp_path / "best"
    run_on_ranks(recommend, ranks, settings(factors, out, index=str(exports / library)))
    found, exact = read(out), read(best)
    assert found["user"] == exact["user"]
    hits = [len(set(mine) & set(all_items)) for mine, all_items in zip(found["items"], exact["items"], strict=True)]
    whole = json.loads((out / "manifest.json").read_text())
    manifest = whole["index"]
    first = 64 * ranks  # each rank asks for its first block
    assert manifest["recall"] == pytest.approx(sum(hits[:first]) / (first * K))
    assert manifest["recall"] > 0.9  # several threads build the graph of usearch, each time another one
    assert {len(items) for items in found["items"]} == {K}
    for mine, scores, all_items, all_scores in zip(
        found["items"], found["scores"], exact["items"], exact["scores"], strict=True
    ):
        known = dict(zip(all_items, all_scores, strict=True))
        assert all(known.get(item, score) == score for item, score in zip(mine, scores, strict=True))
    resumed = tmp_path / "resumed"  # after its last part: nothing remains to measure
    shutil.copytree(out, f"{resumed}.unfinished")
    (tmp_path / "resumed.unfinished" / "manifest.json").unlink()
    run_on_ranks(recommend, ranks, settings(factors, resumed, index=str(exports / library)))
    again = json.loads((resumed / "manifest.json").read_text())
    assert (again["index"], again["memory"]) == (manifest, whole["memory"])


def test_an_export_without_an_index_or_of_another_model(model, factors, exports, tmp_path, capsys, monkeypatch):
    command = ["recommend", "--model", factors, "--out", str(tmp_path / "best"), "--index"]
    for changed, words in (
        ([str(exports / "none")], "has no index"),
        ([factors], "kind 'factors'"),
        ([str(exports / "faiss"), "--model", model], "an export of another model"),
    ):
        assert main([*command, *changed]) == 2
        assert words in capsys.readouterr().err
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main([*command, str(exports / "faiss")]) == 2
    assert "pip install faiss-cpu" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
