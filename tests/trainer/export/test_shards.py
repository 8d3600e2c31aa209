"""Tables of a saved model, joined from rectangles of rows and columns."""

import numpy as np
import pytest
import torch

from recpress.data.errors import InputError
from recpress.modules.frozen.kernel import encode_rows
from recpress.modules.serving.rows import narrower
from recpress.trainer.export import shards
from recpress.trainer.export.shards import SavedTable

TABLE = np.random.default_rng(0).standard_normal((50, 8)).astype(np.float32)


def write(folder, *rectangles, table=TABLE):
    for r0, r1, c0, c1 in rectangles:
        np.save(folder / f"rows-{r0}-{r1}-columns-{c0}-{c1}.npy", table[r0:r1, c0:c1])
    return folder


@pytest.mark.parametrize(
    "rectangles",
    [[(0, 50, 0, 8)], [(0, 20, 0, 8), (20, 50, 0, 8)], [(0, 50, 0, 4), (0, 30, 4, 8), (30, 50, 4, 8)]],
)
def test_blocks_are_the_rows_in_order_for_any_sharding(rectangles, tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "BLOCK_BYTES", 7 * 32)  # 7 rows
    blocks = list(SavedTable(write(tmp_path, *rectangles), "fp32", 50, 8).blocks("fp32"))
    assert [len(block["values"]) for block in blocks] == [7] * 7 + [1]
    assert torch.equal(torch.cat([block["values"] for block in blocks]), torch.from_numpy(TABLE))


def test_quantized_rows_are_copied_and_others_are_encoded_alike(tmp_path):
    encoded = encode_rows(torch.from_numpy(TABLE), "int8").numpy()
    for name in ("stored", "plain"):
        (tmp_path / name).mkdir()
    stored = SavedTable(write(tmp_path / "stored", (0, 50, 0, 16), table=encoded), "int8", 50, 8)
    plain = SavedTable(write(tmp_path / "plain", (0, 50, 0, 8)), "fp32", 50, 8)
    [kept], [made] = stored.blocks("int8"), plain.blocks("int8")
    assert torch.equal(kept["codes"], made["codes"])
    assert torch.equal(kept["scales"], made["scales"])
    assert (narrower("int4", "int8"), narrower("fp32", "fp16")) == ("int4", "fp16")


@pytest.mark.parametrize(
    ("rectangles", "storage", "message"),
    [
        ([(0, 20, 0, 8)], "fp32", "holds 160 of the 400 values"),
        ([(0, 50, 0, 4)], "fp32", "rows of 4 values, expected 8"),
        ([(0, 50, 0, 8)], "int8", "sharded by column cannot be exported"),
        ([], "fp32", "no shard of this table"),
    ],
)
def test_missing_parts_are_refused(rectangles, storage, message, tmp_path):
    with pytest.raises(InputError, match=message):
        SavedTable(write(tmp_path, *rectangles), storage, 50, 8)


def test_a_shard_of_another_shape_or_a_damaged_one_is_refused(tmp_path):
    np.save(tmp_path / "rows-0-50-columns-0-8.npy", TABLE[:9])
    with pytest.raises(InputError, match=r"shape \(9, 8\), expected \(50, 8\)"):
        SavedTable(tmp_path, "fp32", 50, 8)
    (tmp_path / "rows-0-50-columns-0-8.npy").write_bytes(b"no array")
    with pytest.raises(InputError, match="not a shard of a table"):
        SavedTable(tmp_path, "fp32", 50, 8)
