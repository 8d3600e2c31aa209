"""The report of a compression, and loading by it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from recpress.modules.compression.replace import compress
from recpress.modules.hashing.shared_rows import warm_rows
from tests.modules.compression.model_cases import (
    DIM,
    IDS,
    dlrm,
    id_map,
    source,
)


def test_the_report() -> None:
    model = dlrm()
    frozen = {"t2": source(), "t3": source()}
    _, report = compress(model, {"t0": id_map(10), "t3": id_map(5)}, frozen, storage="int8", packed=True)
    by_table = {t.table: t for t in report.tables}
    assert {k: (t.kind, t.rows_before, t.rows_after) for k, t in by_table.items()} == {
        "t0": ("shared", IDS, 10),
        "t2": ("frozen", IDS, IDS),
        "t3": ("frozen, shared", IDS, 5),
    }
    assert [t.bytes_after for t in report.tables] == [10 * DIM * 4, IDS * (DIM + 8), 5 * (DIM + 8)]
    assert [t.map_bytes for t in report.tables] == [IDS * 4 // 8, 0, IDS * 3 // 8]
    compressed = model.sparse_arch.embedding_bag_collection
    assert compressed.frozen.storage_bytes() == sum(t.bytes_after for t in report.tables[1:])
    lines = str(report).splitlines()
    assert lines[1].split() == ["t0", "shared", "40", "10", "1,280", "320", "20"]
    assert lines[-1] == "bytes kept, maps included: 28.0 %"


def test_tables_without_rows_are_skipped() -> None:
    _, report = compress(dlrm(device="meta"), {"t0": id_map()}, {"t2": source()}, warm_start=False)
    assert set(report.rows) == {"t2"}
    with pytest.raises(ValueError, match="no compressed collection"):
        report.load(dlrm())


def test_the_state_dict_has_frozen_rows_under_their_old_names() -> None:
    model = nn.ModuleDict({"m": dlrm()})
    names = set(model.state_dict())
    model, report = compress(model, {"t0": id_map(10), "t3": id_map(5)}, {"t2": source(), "t3": source()})
    found = report.state_dict(model)
    assert set(found) == names
    bags = "m.sparse_arch.embedding_bag_collection.embedding_bags"
    assert torch.equal(found[f"{bags}.t2.weight"], source())
    assert torch.equal(found[f"{bags}.t3.weight"], warm_rows(source(), id_map(5))[0])
    assert found[f"{bags}.t0.weight"].shape == (10, DIM)
