"""The examples run as they are, on a small log with the columns of Criteo's."""

from __future__ import annotations

import contextlib
import io
import re
import runpy
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from recpress.modules import HashConfig, TableStats, build_map, open_rows
from tests.ranks import run_on_ranks

EXAMPLE = Path(__file__).parents[1] / "examples" / "compress_dlrm.py"


def made_log(path: Path, rows: int = 1500) -> None:
    """Ids of C1 tell the label; some numbers and ids are missing, as in Criteo's own."""
    rng = np.random.default_rng(0)
    ids = {f"C{i}": rng.integers(0, 200 if i == 1 else 20 * i, rows) * 7_919 for i in range(1, 27)}
    columns: dict[str, pa.Array] = {"label": pa.array(((ids["C1"] // 7_919) % 2).astype(np.int8))}
    missing = rng.random(rows) < 0.2
    for i in range(1, 14):
        numbers = rng.integers(-1, 500, rows)
        if i == 1:  # as recpress synth-criteo writes them
            columns["I1"] = pa.array(np.where(missing, np.nan, numbers).astype(np.float32))
        else:
            columns[f"I{i}"] = pa.array(numbers.astype(np.int32), mask=missing)
    for name, values in ids.items():
        columns[name] = pa.array(values, mask=missing if name == "C22" else None)
    pq.write_table(pa.table(columns), path)


@pytest.mark.parametrize("more", [[], ["--dcn"]])
def test_compress_dlrm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], more: list[str]
) -> None:
    made_log(tmp_path / "log.parquet")
    monkeypatch.setattr("sys.argv", [str(EXAMPLE), str(tmp_path / "log.parquet"), "--keep", "0.2", *more])
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    out = capsys.readouterr().out
    before, at, after = (float(x) for x in re.findall(r": +(\d\.\d+)$", out, flags=re.MULTILINE))
    assert all(0 < loss < 1.5 for loss in (before, at, after))
    rows = [line.split() for line in out.splitlines() if line.startswith("C")]
    assert ["C1", "shared", "200", "40"] in [row[:4] for row in rows]
    assert len(rows) == 23  # C1 and C5 to C26 have 100 ids or more
    kept = re.search(r"bytes kept, maps included: ([\d.]+) %", out)
    assert kept is not None
    assert float(kept[1]) < 40


def test_the_example_is_short() -> None:
    assert len(EXAMPLE.read_text(encoding="utf-8").splitlines()) < 80


SHARDED = EXAMPLE.with_name("sharded_dlrm.py")


def run_sharded(*options: str) -> float:
    """The log loss that the example prints on rank 0; 0 on other ranks."""
    out = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out):
        patch.setattr("sys.argv", [str(SHARDED), "--steps", "30", *options])
        runpy.run_path(str(SHARDED), run_name="__main__")
    return float(out.getvalue().split()[-1]) if out.getvalue() else 0.0


def test_a_sharded_dlrm_is_compressed_and_resumed_on_one_rank(tmp_path: Path) -> None:
    full, small, maps = (tmp_path / name for name in ("full", "small", "maps"))
    first = run_on_ranks(run_sharded, 2, "--out", str(full))[0]
    for table, size in (("t_0", 3000), ("t_2", 1000)):
        (maps / table).mkdir(parents=True)
        stats = TableStats(name=table, num_ids=size, counts=torch.ones(size), embedding=open_rows(full, table))
        build_map(stats, size // 4, HashConfig(method="learned")).save(maps / table)
    options = ("--rows", str(full), "--maps", str(maps), "--frozen", "t_2")
    second = run_on_ranks(run_sharded, 2, *options, "--out", str(small))[0]
    [resumed] = run_on_ranks(run_sharded, 1, *options, "--resume", str(small))
    assert resumed == pytest.approx(second, abs=2e-6)
    assert second < first  # it starts from the rows of the first run, and trains as long


def test_few_lines_are_for_recpress() -> None:
    lines = [line for line in SHARDED.read_text(encoding="utf-8").splitlines() if "# recpress:" in line]
    assert 1 <= len(lines) <= 6
