"""`recpress bench`: the list, a run, and the page."""

import re

import pytest

from recpress.benchmarks.common import publish
from recpress.data.errors import InputError
from recpress.trainer.bench import config as bench_config
from recpress.trainer.bench.config import BenchRunConfig, benchmarks, chosen
from recpress.trainer.bench.page import read_results
from recpress.trainer.bench.stages import run
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
