"""The command line and the config files, as a newcomer meets them."""

import os
import subprocess
import sys
from dataclasses import dataclass, field

import pytest

from recpress.data.errors import InputError
from recpress.trainer import config_file
from recpress.trainer.cli import COMMANDS, main


@dataclass(frozen=True, kw_only=True)
class Inner:
    factors: int = 8
    rate: float = 0.5
    verbose: bool = False
    widths: tuple[int, ...] = (1,)


@dataclass(frozen=True, kw_only=True)
class Outer:
    data: str
    label: str | None = None
    als: Inner = field(default_factory=Inner)


def write(tmp_path, text):
    path = tmp_path / "run.toml"
    path.write_text(text)
    return str(path)


def test_a_file_becomes_arguments_that_the_command_line_overrides(tmp_path):
    path = write(tmp_path, 'data = "a"\n[als]\nfactors = 3\nrate = 1\nverbose = true\nwidths = [4, 5]\n')
    arguments = config_file.arguments(path, Outer, ["--als.factors=9", "--als.no-verbose"])
    assert arguments == [
        *("--data", "a", "--als.rate", "1", "--als.widths", "4", "5"),
        *("--als.factors=9", "--als.no-verbose"),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[als]\nfactrs = 3\n", "unknown key 'als.factrs', nearest is 'als.factors'"),
        ("[als]\nfactors = 3.5\n", "'als.factors' is 3.5, expected int"),
        ('[als]\nrate = "x"\n', "'als.rate' is 'x', expected float"),
        ("[als]\nfactors = true\n", "'als.factors' is True, expected int"),
        ("[als]\nwidths = [1, 'a']\n", "'als.widths' is [1, 'a'], expected a list of int"),
        ("als = 3\n", "'als' is 3, expected a table"),
        ("data = [\n", "not a TOML file"),
    ],
)
def test_a_bad_file_is_one_error_that_names_file_and_key(tmp_path, text, message):
    path = write(tmp_path, text)
    with pytest.raises(InputError) as error:
        config_file.arguments(path, Outer, [])
    assert str(error.value).startswith(path)
    assert message in str(error.value)


def test_a_config_error_exits_2_in_one_line(tmp_path, capsys):
    path = write(tmp_path, "[als]\nfactrs = 3\n")
    assert main(["factorize", "--config", path, "--data", "a", "--out", "b"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "als.factors" in err


def test_an_unknown_command_and_an_unknown_option_name_what_there_is(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["factorise"])
    assert stop.value.code == 2
    assert "factorize" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        main(["bench", "--help"])
    assert stop.value.code == 2
    assert "'bench': expected one of bench list, bench run, bench page" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        main(["factorize", "--data", "a", "--out", "b", "--als.factrs", "3"])
    assert stop.value.code == 2
    output = capsys.readouterr()
    assert "--als.factors" in output.out + output.err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["trian", "--data", "x"], ["'trian':", "did you mean 'train'?"]),
        (["compare", "cacd", "--data", "x"], ["'compare cacd':", "did you mean 'compare cadc'?"]),
        (["compare", "--data", "x"], ["'compare':", "compare cadc, compare hash, compare both"]),
        (["--data", "x", "train"], ["'--data'", "where the command"]),
    ],
)
def test_the_word_that_is_no_command_is_named_alone_with_the_nearest(arguments, said, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    for part in said:
        assert part in error
    assert "x'" not in error


@pytest.mark.parametrize("arguments", [["hash", "--help"], ["--help"]])
def test_help_that_nobody_reads_to_the_end_is_no_error(arguments):
    """As with `| head`: the reader has gone before all is written."""
    reader, writer = os.pipe()
    os.close(reader)
    program = [sys.executable, "-m", "recpress.trainer.cli", *arguments]
    done = subprocess.run(program, stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name, capsys):
    with pytest.raises(SystemExit) as stop:
        main([*name.split(), "--help"])
    assert stop.value.code == 0
    assert "--" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["bench", "list"], ["train", "--help"], ["train", "--config", "none.toml"], ["train", "--nothing"]],
)
def test_help_and_config_errors_answer_without_torch(arguments):
    program = (
        "import sys\n"
        "from recpress.trainer.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'torchrec', 'pyarrow', 'matplotlib'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_data_package_does_not_import_torchrec():
    program = (
        "import importlib, pkgutil, sys, recpress.data\n"
        "for module in pkgutil.walk_packages(recpress.data.__path__, 'recpress.data.'):\n"
        "    if module.name.rpartition('.')[2] not in ('batch', 'keyed'): importlib.import_module(module.name)\n"
        "sys.exit('torchrec' in sys.modules)\n"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


@pytest.mark.parametrize(("given", "kept"), [(None, "passive"), ("active", "active")])
def test_clustering_does_not_spin_on_cores_of_others_unless_told_to(tmp_path, monkeypatch, given, kept):
    monkeypatch.setenv("OMP_WAIT_POLICY", "to be restored")
    monkeypatch.delenv("OMP_WAIT_POLICY")
    if given:
        monkeypatch.setenv("OMP_WAIT_POLICY", given)
    assert main(["hash", "--data", str(tmp_path / "none"), "--out", str(tmp_path / "maps")]) == 2
    assert os.environ["OMP_WAIT_POLICY"] == kept
