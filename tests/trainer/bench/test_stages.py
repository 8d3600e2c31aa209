"""`recpress bench`: the list, a run, and the page."""

import json
import os
import re

import pytest

from recpress.benchmarks.common import bars, lines, publish
from recpress.benchmarks.processes import PeakMemory, in_own_processes
from recpress.data.errors import InputError
from recpress.trainer.bench import config as bench_config
from recpress.trainer.bench.config import BenchPageConfig, BenchRunConfig, benchmarks, chosen
from recpress.trainer.bench.page import read_results, shown
from recpress.trainer.bench.stages import page, run
from recpress.trainer.cli import main

HOSTILE = "<script>alert('x')</script>"
MADE = '''"""What does it ask?

Takes two shakes of
a tail.

More.
"""
import pathlib, sys
SMALL = ("--size", "few")
FULL = ("--size", "many")
{constants}
if __name__ == "__main__":
    {body}
'''


@pytest.fixture
def made(tmp_path, monkeypatch):
    """A folder of benchmarks: `good` writes its arguments, `bad` fails."""
    folder = tmp_path / "made"
    folder.mkdir()
    body = "out = pathlib.Path(sys.argv[-1]); out.with_suffix('.txt').write_text(' '.join(sys.argv[1:-1]))"
    (folder / "good.py").write_text(MADE.format(constants="RANKS = True", body=body))
    (folder / "bad.py").write_text(MADE.format(constants="", body="sys.exit(3)"))
    (folder / "special.py").write_text(MADE.format(constants="NEEDS = 'a moon'", body="pass"))
    (folder / "helper.py").write_text('"""No benchmark."""\n')
    monkeypatch.setattr(bench_config, "benchmarks", lambda: benchmarks(folder))
    monkeypatch.setattr("recpress.trainer.bench.stages.benchmarks", lambda: benchmarks(folder))
    return folder


def result(tmp_path, capsys, **values):
    out = tmp_path / "results" / "made.json"
    rows = [
        {"loop": loop, "rows": rows, "batch": 8, "rows/s": speed * rows, "peak MB": 1234.5, "ok": True}
        for loop, speed in (("ours", 2.0), (HOSTILE, 1.0))
        for rows in (1000, 2000, 16_000)
    ] + [{"loop": "peer", "note": "not installed"}]
    publish("How fast?", rows, out=out, settings={"steps": 3}, **values)
    return out, capsys.readouterr().out


def test_the_list_has_a_line_for_each_benchmark(capsys):
    assert main(["bench", "list"]) == 0
    out = capsys.readouterr().out
    for name, benchmark in benchmarks().items():
        assert re.search(rf"^{name} +\S", out, re.MULTILINE)
        assert benchmark.summary.split()[0] in out
        assert re.match(r"Takes .+ small", benchmark.takes) or benchmark.needs, name
        assert benchmark.takes.split(",")[0] in out
    assert not {"common", "processes", "plain_torch", "__init__"} & set(benchmarks())


@pytest.mark.parametrize("name", benchmarks())
def test_a_benchmark_takes_an_output_file_and_the_arguments_of_its_sizes(name):
    benchmark = benchmarks()[name]
    source = benchmark.path.read_text()
    flags = [word for word in (*benchmark.small, *benchmark.full) if word.startswith("--")]
    for flag in ["--out", *flags]:
        assert f'"{flag}"' in source or f'("{flag[2:]}"' in source, flag


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["remapp"], "unknown benchmark 'remapp', nearest is 'remap'"),
        (["remap", "xyz"], "unknown benchmark 'xyz'; expected 'all' or some of"),
        ([], "expected names of benchmarks, or 'all'"),
        (["remap", "--size", "huge"], "invalid choice 'huge'"),
    ],
)
def test_what_cannot_be_run_is_one_error_with_status_2(words, message, capsys):
    assert main(["bench", "run", *words]) == 2
    text = capsys.readouterr().err
    assert message in text
    assert text.count("\n") == 1


def test_all_leaves_out_what_needs_something_special(made):
    assert [benchmark.name for benchmark in chosen(("all",))] == ["bad", "good"]
    assert [benchmark.name for benchmark in chosen(("special", "good", "special"))] == ["special", "good"]
    assert chosen(("good",))[0].summary == "What does it ask?"
    assert chosen(("good",))[0].takes == "Takes two shakes of a tail."


def test_sizes_and_own_arguments_reach_a_benchmark_and_a_failure_does_not_stop_the_others(made, tmp_path, capfd):
    out = tmp_path / "out"
    out.mkdir()
    result(out.parent, capfd)[0].rename(out / "earlier.json")
    with pytest.raises(InputError, match=r"failed: bad \(exit status 3\)"):
        run(BenchRunConfig(names=("bad", "good"), out=str(out), size="full", args=("--steps", "3")))
    assert (out / "good.txt").read_text() == "--size many --steps 3 --out"
    assert "How fast?" in (out / "report.html").read_text()
    assert re.search(r"^seconds: bad \d+, good \d+$", capfd.readouterr().out, re.MULTILINE)


def test_on_several_processes_one_benchmark_that_knows_ranks_runs(made, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    for names in (("bad",), ("good", "bad")):
        with pytest.raises(InputError, match=r"2 processes: expected one benchmark that runs on several \(good\)"):
            run(BenchRunConfig(names=names, out=str(tmp_path)))
    run(BenchRunConfig(names=("good",), out=str(tmp_path)))
    assert (tmp_path / "good.txt").exists()
    assert not (tmp_path / "report.html").exists()  # rank 0 draws it


def test_a_benchmark_runs_through(tmp_path):
    out = str(tmp_path / "bench")
    words = ["--ids", "400", "--dims", "4", "--threads", "1", "--most-faiss", "0", "--iterations", "2"]
    assert main(["bench", "run", "map_build", "--out", out, "--", *words]) == 0
    (found,) = read_results(out)
    ours, peer = found.rows
    assert (ours["engine"], ours["rows"], peer["note"]) == ("recpress", 40, "not run above 0 ids")
    assert ours["rows used"] <= 40
    assert 0.1 < found.seconds < 600
    text = (tmp_path / "bench" / "report.html").read_text()
    assert "faiss" in text
    assert f"Settings of map_build, which took {found.seconds:,.0f} s" in text


def test_a_result_is_a_table_and_a_page_of_its_rows(tmp_path, capsys):
    at = {"rows": 1000, "batch": 8}
    plots = [
        lines(["rows", "batch"], ["rows/s", "peak MB"], ["loop"], at=at, title="Speed"),
        bars(["rows/s"], ["loop", "rows"], title="All", only={"loop": ["ours"]}),
    ]
    out, printed = result(tmp_path, capsys, plots=plots)
    assert "How fast?" in printed
    assert "not installed" in printed
    page(BenchPageConfig(folder=str(out.parent)))
    text = (out.parent / "report.html").read_text()
    assert "<script" not in text
    assert text.count("<figure") == 2  # one value of batch is no line
    assert "Speed: rows/s and peak MB against rows; batch 8." in text
    assert "ours, rows 16,000" in text
    for cell in ("32,000", "1,234", "not installed", "yes"):
        assert f">{cell}<" in text
    assert not re.search(r"""(?:src|href)=["']?(?:https?:)?//""", text)
    assert main(["bench", "page", str(out.parent), "--out", str(tmp_path / "other.html")]) == 0
    assert (tmp_path / "other.html").read_text() == text


def test_without_plots_the_page_draws_a_measure(tmp_path, capsys):
    out, _ = result(tmp_path, capsys)
    page(BenchPageConfig(folder=str(out.parent)))
    assert "rows/s, by loop." in (out.parent / "report.html").read_text()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not a result of `recpress bench run`"),
        ("[1]", "not a result"),
        (json.dumps({"format": 1, "rows": []}), "it has no 'benchmark'"),
        (json.dumps({"format": 99}), "format 99, expected 1"),
    ],
)
def test_a_file_that_is_no_result_is_named(text, message, tmp_path, capsys):
    (tmp_path / "odd.json").write_text(text)
    assert main(["bench", "page", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert f"{tmp_path}/odd.json: " in error
    assert message in error


def test_an_empty_folder_has_no_page(tmp_path, capsys):
    assert main(["bench", "page", str(tmp_path)]) == 2
    assert "no results" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1234567, "1,234,567"),
        (0.123456, "0.1235"),
        (123456.7, "123,457"),
        (None, "\N{EN DASH}"),
        (float("nan"), "\N{EN DASH}"),
        (True, "yes"),
    ],
)
def test_values_of_a_table(value, text):
    assert shown(value) == text


def test_cases_run_on_ranks_of_their_own_and_a_failure_is_told():
    assert in_own_processes(os.getenv, 2, "RANK") == ["0", "1"]
    assert in_own_processes(os.getenv, 1, "WORLD_SIZE") == ["1"]
    with pytest.raises(RuntimeError, match=r"a case failed:(.|\n)*invalid literal for int"):
        in_own_processes(int, 1, "x")
    with pytest.raises(RuntimeError, match="ended without a result"):
        in_own_processes(os._exit, 1, 3)


def test_the_peak_of_memory_counts_what_was_freed():
    memory = PeakMemory()
    held = bytearray(os.urandom(1 << 20)) * 64
    del held
    assert 60 << 20 < memory.bytes < 100 << 20
