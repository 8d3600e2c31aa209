"""Rows in files: each format gives the rows of the table, and damaged or ambiguous files are named."""

from __future__ import annotations

import pickle
import shutil
import warnings
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import checkpoint

from recpress.modules.compression.sharders import sharders
from recpress.modules.row_files import RowFile, _metadata, open_rows
from recpress.modules.row_source import load_rows
from tests.modules.compression.model_cases import Train, dlrm, source
from tests.ranks import run_on_ranks

ROWS = source(40, 6)


@pytest.fixture
def files(tmp_path: Path) -> dict[str, RowFile]:
    np.save(tmp_path / "rows.npy", ROWS.numpy())
    torch.save({"model": {"x.embedding_bags.t.weight": ROWS, "step": 3}}, tmp_path / "state.pt")
    columns = {"id": range(40), "vector": list(ROWS.numpy())}
    pq.write_table(pa.table(columns), tmp_path / "one.parquet", row_group_size=7)
    (tmp_path / "parts").mkdir()
    pq.write_table(pa.table({"vector": list(ROWS[:25].numpy())}), tmp_path / "parts" / "0.parquet")
    pq.write_table(pa.table({"vector": list(ROWS[25:].numpy())}), tmp_path / "parts" / "1.parquet")
    state = {"x.embeddings.t.weight": nn.Parameter(ROWS), "y.embedding_bags.u.weight": ROWS.bfloat16(), "step": 3}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        checkpoint.save(state, checkpoint_id=tmp_path / "dcp", no_dist=True)
    return {
        "array": ROWS.numpy(),
        "npy": tmp_path / "rows.npy",
        "pt": tmp_path / "state.pt",
        "pt with key": (tmp_path / "state.pt", "model.x.embedding_bags.t.weight"),
        "parquet": str(tmp_path / "one.parquet"),
        "parquet with column": (tmp_path / "one.parquet", "vector"),
        "folder of parquet": tmp_path / "parts",
        "checkpoint": tmp_path / "dcp",
        "checkpoint with key": (tmp_path / "dcp", "x.embeddings.t.weight"),
    }


def test_every_format_gives_blocks_columns_and_single_rows(files: dict[str, RowFile]) -> None:
    some = np.array([39, 0, 24, 25, 7])
    for name, file in files.items():
        rows = open_rows(file, "t")
        assert tuple(rows.shape) == (40, 6), name
        for index in (slice(5, 31), (slice(20, 40), slice(1, 4)), some):
            assert torch.equal(torch.as_tensor(rows[index]).float(), ROWS[index]), (name, index)
    assert torch.equal(open_rows(files["checkpoint"], "u")[0:40], ROWS.bfloat16().float())


def test_what_cannot_be_read_is_named(files: dict[str, RowFile], tmp_path: Path) -> None:
    folder = tmp_path / "dcp"
    pq.write_table(pa.table({"a": [[1.0]], "b": [[1.0]]}), tmp_path / "two.parquet")
    torch.save({"a.embedding_bags.t.weight": ROWS, "b.embedding_bags.t.weight": ROWS}, tmp_path / "two.pt")
    (tmp_path / "text.txt").write_text("x")
    for file, table, message in (
        (folder, "v", r"no tensor 'embedding_bags.v.weight'; it has .*x.embeddings.t.weight"),
        ((folder, "z"), "t", "no tensor 'z'"),
        ((tmp_path / "one.parquet", "id"), "t", "no list column 'id'; it has vector"),
        (tmp_path / "two.parquet", "t", "expected one list column; it has a, b"),
        (tmp_path / "two.pt", "t", r"several tensors fit: a\..*, b\..*; pass \(path, key\)"),
        (tmp_path / "none.npy", "t", "no.*such file"),
        (tmp_path / "text.txt", "t", "unknown format"),
    ):
        with pytest.raises(ValueError, match=message) as raised:
            open_rows(file, table)
        assert f"table {table!r}" in str(raised.value)


def test_damaged_and_malicious_checkpoints(files: dict[str, RowFile], tmp_path: Path) -> None:
    folder = tmp_path / "dcp"
    [data] = folder.glob("*.distcp")
    whole = data.read_bytes()
    data.write_bytes(whole[:300])
    with pytest.raises(ValueError, match="table 't'"):
        open_rows(folder, "t")
    data.write_bytes(whole)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        checkpoint.save({"embedding_bags.t.weight": ROWS.T}, checkpoint_id=tmp_path / "turned", no_dist=True)
    with pytest.raises(ValueError, match="has strides"):
        open_rows(tmp_path / "turned", "t")

    class Run:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return shutil.rmtree, (str(tmp_path),)

    (folder / ".metadata").write_bytes(pickle.dumps(Run()))
    with pytest.raises(ValueError, match=r"unexpected class shutil\.rmtree"):
        open_rows(folder, "t")
    # names with dots reach through a module that is allowed
    (folder / ".metadata").write_bytes(b"ctorch.distributed.checkpoint.metadata\nos.getcwd\n)R.")
    with pytest.raises(ValueError, match="unexpected class"):
        open_rows(folder, "t")
    # members of an enum may be attributes, others not
    (folder / ".metadata").write_bytes(b"cbuiltins\ngetattr\n(cpathlib\nPath\nVcwd\ntR)R.")
    with pytest.raises(ValueError, match="the attribute 'cwd'"):
        open_rows(folder, "t")
    assert tmp_path.is_dir()


def test_members_of_an_enum_as_every_python_pickles_them(tmp_path: Path) -> None:
    """Python before 3.11.4 pickles a member as an attribute of its class, later ones as a call of the class."""
    kind = b"ctorch.distributed.checkpoint.metadata\n_MEM_FORMAT_ENCODING\n"
    for pickled in (b"cbuiltins\ngetattr\n(%bVTORCH_CHANNELS_LAST\ntR.", b"%b(I1\ntR."):
        (tmp_path / ".metadata").write_bytes(pickled % kind)
        assert _metadata(tmp_path).name == "TORCH_CHANNELS_LAST"


def save_sharded(folder: str) -> None:
    from torchrec.distributed.model_parallel import DistributedModelParallel

    model = DistributedModelParallel(Train(dlrm(device="meta")), device=torch.device("cpu"), sharders=sharders())
    with torch.no_grad():
        weights = model.state_dict()
        load_rows(weights["model.sparse_arch.embedding_bag_collection.embedding_bags.t2.weight"], "t2", source())
    checkpoint.save(model.state_dict(), checkpoint_id=folder)
    dist.barrier()


def test_a_table_that_two_ranks_saved(tmp_path: Path) -> None:
    run_on_ranks(save_sharded, 2, str(tmp_path / "dcp"))
    assert torch.equal(open_rows(tmp_path / "dcp", "t2")[0:40], source())
