"""Parts on an object store, and which rank writes which users."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recpress.data.dataset import artifact, object_store
from recpress.data.dataset.files import resolve
from recpress.data.errors import InputError
from recpress.trainer.recommend.parts import Output, Share, part_name
from tests.ranks import run_on_ranks
from tests.s3_server import s3  # noqa: F401  # a fixture

ROWS = [3, 3, 2]
TABLE = pa.table({"user": [5, 6, 7], "items": [[1], [2], []], "scores": [[1.0], [0.5], []]})


@pytest.fixture(params=["disk", "store"])
def base(request, monkeypatch, tmp_path):
    if request.param == "disk":
        return str(tmp_path)
    monkeypatch.setenv("RECPRESS_STORAGE_PATIENCE", "0.2")
    request.getfixturevalue("s3").use(monkeypatch.setenv)
    return "s3://bucket/parts"


def start(base, run, overwrite, parts):
    """Parts that remain; writes the first of them. Without `parts`, also the manifest."""
    output = Output(f"{base}/out", run, ROWS)
    remain = output.open(overwrite=overwrite, inputs=[])
    output.begin({"memory": 7})
    for part in remain[:parts]:
        output.write_part(part, TABLE.slice(0, ROWS[part]), 1)
    if parts is None:
        output.finish({"parts": len(ROWS), **output.short_lists()}, overwrite=overwrite)
    return remain.tolist()


def test_a_run_that_stopped_resumes(base):
    def run(*args):
        return run_on_ranks(start, 1, base, *args)[0]

    assert run({"k": 1}, False, 2) == [0, 1, 2]
    with pytest.raises(InputError, match="k: 1 -> 2"):
        run({"k": 2}, False, 1)
    assert run({"k": 1}, False, 0) == [2]
    assert run({"k": 1}, True, None) == [2]  # --overwrite does not discard parts of the same run
    manifest = artifact.read_manifest(f"{base}/out", "recommendations")
    assert (manifest["short"], manifest["empty"]) == (2, 2)  # of all runs
    names = [*(part_name(part) for part in range(3)), "run.json"]
    assert [file["name"] for file in manifest["contents"]] == names
    assert sorted(object_store.list_files(f"{base}/out")) == ["manifest.json", *names]
    filesystem, path = resolve(f"{base}/out")
    found = pq.read_table(f"{path}/recommendations", filesystem=filesystem)
    assert found["user"].to_pylist() == [5, 6, 7, 5, 6, 7, 5, 6]
    with pytest.raises(InputError, match="exists already"):
        run({"k": 1}, False, 1)
    assert run({"k": 2}, True, None) == [0, 1, 2]
    assert json.loads(object_store.read_bytes(f"{base}/out/run.json")) == {"k": 2, "measured": {"memory": 7}}


def test_every_user_of_the_parts_that_remain_has_one_rank_and_slot():
    remain, world = np.array([0, 2, 3, 5]), 3
    shares = [Share(remain, 4, 23, rank, world) for rank in range(world)]
    owner, slot = shares[0].locate(np.arange(-1, 23))
    assert owner[0] == -1
    for position in range(23):
        part, (rank, place) = position // 4, (owner[position + 1], slot[position + 1])
        if part not in remain:
            assert rank == -1
            continue
        share = shares[rank]
        assert share.part(place // 4) == part
        assert share.start(place // 4) + place % 4 == position
        assert place in share.filled
    assert sum(len(share.filled) for share in shares) == 4 + 4 + 4 + 3
    assert [share.rounds for share in shares] == [2, 2, 2]
    assert shares[0].sizes(1) == [3, 0, 0]
