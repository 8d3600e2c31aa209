"""The stages on an object store: the same results as on local disk, on one rank and on two without a common disk."""

import json
import os
import tempfile

import numpy as np
import pytest

from recpress.data.config import SampleConfig, StreamConfig, SynthConfig
from recpress.data.dataset import artifact, object_store
from recpress.data.dataset.log import open_log
from recpress.data.errors import InputError
from recpress.data.synthetic.interactions import synth
from recpress.modules.config import ALSConfig
from recpress.trainer.artifacts import factors as artifacts
from recpress.trainer.cli import main
from recpress.trainer.config import CheckpointConfig, TrainConfig
from recpress.trainer.evaluate.config import EvaluateConfig
from recpress.trainer.evaluate.stage import evaluate
from recpress.trainer.factorize.config import FactorizeConfig
from recpress.trainer.factorize.stage import factorize
from recpress.trainer.hash.config import HashStageConfig
from recpress.trainer.hash.stage import make_maps
from recpress.trainer.pipeline.config import PipelineConfig
from recpress.trainer.pipeline.stage import pipeline
from recpress.trainer.prepare import stages as logs
from recpress.trainer.prepare.config import IngestCommand, SampleCommand, SplitConfig
from recpress.trainer.train.stage import train
from tests.ranks import run_on_ranks
from tests.s3_server import s3  # noqa: F401  # a fixture

SMALL = SynthConfig(users=60, items=150, rows=900, tastes=4, held_out_users=20, negatives=5)
ALS = ALSConfig(factors=8, sweeps=2)


@pytest.fixture
def base(s3, request, monkeypatch, tmp_path):  # noqa: F811
    monkeypatch.setenv("RECPRESS_STORAGE_TIMEOUT", "2")
    monkeypatch.setenv("RECPRESS_STORAGE_PATIENCE", "0.2")
    monkeypatch.setenv("RECPRESS_CACHE", str(tmp_path / "cache"))
    s3.use(monkeypatch.setenv)
    return f"s3://bucket/{request.node.name.replace('[', '-').rstrip(']')}"


def stages(base: str, local: str) -> dict[str, float]:
    """All stages, everything read from and written to `base`."""
    tempfile.tempdir = f"{local}/tmp-{os.environ['RANK']}"  # a disk of each rank's own
    os.makedirs(tempfile.tempdir, exist_ok=True)
    try:
        factorize(FactorizeConfig(data=f"{base}/log", out=f"{base}/factors", als=ALS, crossfit_rate=0.5, device="cpu"))
        make_maps(HashStageConfig(data=f"{base}/log", factors=f"{base}/factors", out=f"{base}/maps", share=0.5))
        train(
            TrainConfig(
                data=f"{base}/log",
                factors=f"{base}/factors",
                hash=f"{base}/maps",
                out=f"{base}/model",
                sample=SampleConfig(rate=0.5),
                stream=StreamConfig(batch_size=64),
                checkpoint=CheckpointConfig(steps=2),
                epochs=1,
                tensorboard=False,
                device="cpu",
            )
        )
        metrics = evaluate(
            EvaluateConfig(data=f"{base}/log", model=f"{base}/model", out=f"{base}/metrics.json", device="cpu")
        )
        evaluate(EvaluateConfig(data=f"{base}/log", model=f"{base}/factors", device="cpu"))
    finally:
        tempfile.tempdir = None
    return metrics


def test_all_stages_do_there_what_they_do_on_local_disk(base, tmp_path):
    for place in (base, str(tmp_path)):
        synth(SMALL, f"{place}/log")
    there, here = (run_on_ranks(stages, 1, place, str(tmp_path))[0] for place in (base, str(tmp_path)))
    assert there == here
    assert json.loads(object_store.read_bytes(f"{base}/metrics.json")) == pytest.approx(there)
    for name in ("factors", "maps"):
        contents = [
            [(e["name"], e["fingerprint"]) for e in artifact.read_manifest(f"{place}/{name}")["contents"]]
            for place in (base, str(tmp_path))
        ]
        assert contents[0] == contents[1]
        assert contents[0]
    assert os.listdir(tmp_path / "tmp-0") == []  # nothing is left behind
    assert object_store.list_files(f"{base}/model.checkpoints") == {}
    assert not list((tmp_path / "cache").glob("checkpoints-*"))


def apart(base: str, local: str) -> tuple[dict[str, float], list[str]]:
    """`stages` on ranks that do not see each other's disk."""
    if os.environ["RANK"] != "0":
        artifacts._sees = lambda folder: False
    return stages(base, local), os.listdir(f"{local}/tmp-{os.environ['RANK']}")


def test_ranks_without_a_common_disk_make_one_artifact(base, tmp_path):
    synth(SMALL, f"{base}/log")
    results = run_on_ranks(apart, 2, base, str(tmp_path))
    assert results[0] == results[1]
    metrics, left = results[0]
    assert left == []
    names = [entry["name"] for entry in artifact.read_manifest(f"{base}/factors")["contents"]]
    assert {"user-00000-of-00002.npy", "crossfit/item-00001-of-00002.npy"} <= set(names)
    again = evaluate(EvaluateConfig(data=f"{base}/log", model=f"{base}/model", device="cpu"))
    assert again == pytest.approx(metrics, abs=1e-6)


def test_logs_are_split_ingested_and_extended_there(base, tmp_path):
    csv = "".join(f"u{n % 7},i{n % 31},{n}\n" for n in range(100))
    object_store.write_bytes(f"{base}/raw/a.csv", f"user,item,time\n{csv}".encode())
    columns = {"user": "user", "item": "item", "time": "time", "negatives": 2}
    logs.ingest(IngestCommand(input=f"{base}/raw", out=f"{base}/log", **columns))
    logs.ingest(IngestCommand(input=f"{base}/raw", out=f"{base}/log2", extend=f"{base}/log", **columns))
    split = logs.split(SplitConfig(data=f"{base}/log", out=f"{base}/split", by="last", negatives=0))
    assert split == f"{base}/split"


@pytest.mark.parametrize("shuffle", [False, True])
def test_a_sample_is_written_there(base, tmp_path, shuffle):
    drawn = {"sample": SampleConfig(kind="user", rate=0.3), "shuffle": shuffle}
    for place in (base, str(tmp_path)):
        synth(SMALL, f"{place}/log")
        logs.sample(SampleCommand(data=f"{place}/log", out=f"{place}/part", **drawn))
    there, here = (artifact.read_manifest(f"{place}/part") for place in (base, str(tmp_path)))
    for key in ("contents", "files", "rows"):
        assert there[key] == here[key]
    assert {"train/part-00000.parquet", "test/part-00000.parquet", "items.parquet"} <= {
        e["name"] for e in there["files"]
    }
    assert open_log(f"{base}/part").is_part


def test_an_embedding_is_read_from_there(base, tmp_path):
    from recpress.trainer.hash.embeddings import read_embedding

    matrix = np.arange(12, dtype=np.float32).reshape(4, 3)
    np.save(tmp_path / "x.npy", matrix)
    object_store.upload_file(tmp_path / "x.npy", f"{base}/x.npy")
    np.testing.assert_array_equal(read_embedding(f"{base}/x.npy"), matrix)
    with pytest.raises(InputError, match="no such file"):
        read_embedding(f"{base}/y.npy")


def broken(base: str) -> str:
    with pytest.raises(InputError) as error:
        factorize(FactorizeConfig(data=f"{base}/log", out=f"{base}/factors", als=ALS, device="cpu"))
    return str(error.value)


def test_an_upload_that_fails_is_the_error_of_the_stage_and_leaves_no_artifact(base, s3):  # noqa: F811
    synth(SMALL, f"{base}/log")
    with s3.failing("unavailable", "PUT .*factors/item-00000-of-00001"):
        (message,) = run_on_ranks(broken, 1, base)
    assert message.startswith(f"{base}/factors/item-00000-of-00001.npy: cannot be written: ")
    assert message.endswith("(tried 2 times)")
    with pytest.raises(InputError, match=r"no manifest\.json"):
        artifact.read_manifest(f"{base}/factors")


def test_one_line_on_the_command_line(base, s3, capfd):  # noqa: F811
    assert main(["factorize", "--data", f"{base}/log", "--out", f"{base}/factors"]) == 2
    assert capfd.readouterr().err.strip() == f"recpress: error: {base}/log: no such file or folder"
    synth(SMALL, f"{base}/log")
    assert main(["evaluate", "--data", f"{base}/log", "--model", f"{base}/model"]) == 2
    assert f"error: {base}/model: no manifest.json" in capfd.readouterr().err
    arguments = ["--out", f"{base}/model", "--model.tables.strategy", "random"]
    with s3.failing("denied", "PUT .*model.checkpoints/"):
        assert main(["train", "--data", f"{base}/log", *arguments]) == 2
    assert f"error: {base}/model.checkpoints: cannot hold checkpoints: " in capfd.readouterr().err
    with s3.failing("denied", "GET .*log/"):
        assert main(["factorize", "--data", f"{base}/log", "--out", f"{base}/factors"]) == 2
    assert f"error: {base}/log/manifest.json: cannot be read: AWS Error ACCESS_DENIED" in capfd.readouterr().err


def test_a_pipeline_skips_what_is_complete_on_a_store(base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    synth(SMALL, tmp_path / "log")
    factorized = FactorizeConfig(data="", out="", als=ALS)
    config = PipelineConfig(
        data=str(tmp_path / "log"), out=f"{base}/run", stages=("factorize", "evaluate"), factorize=factorized
    )
    assert pipeline(config) == ["factorize", "evaluate"]
    assert pipeline(config) == []
    assert "factorization" in json.loads(object_store.read_bytes(f"{base}/run/metrics.json"))["methods"]
    assert not (tmp_path / "s3:").exists()
