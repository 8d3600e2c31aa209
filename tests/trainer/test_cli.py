"""The command line and the config files, as a newcomer meets them."""

import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from typing import Literal

import pytest

from recpress.data.errors import InputError
from recpress.trainer import config_file
from recpress.trainer.cli import COMMANDS, main

CLI = [sys.executable, "-m", "recpress.trainer.cli"]


@dataclass(frozen=True, kw_only=True)
class Inner:
    factors: int = 8
    rate: float = 0.5
    verbose: bool = False
    widths: tuple[int, ...] = (1,)
    kinds: tuple[Literal["a", "b"], ...] | None = None


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
        ("[als]\nkinds = ['a', 'c']\n", "'als.kinds' is ['a', 'c'], expected a list of 'a', 'b'"),
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


def test_deprecated_options_of_a_file_are_accepted_with_a_warning(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(config_file, "RENAMED", {"als.width": "als.widths", "solver": "als"})
    path = write(tmp_path, 'data = "a"\n[als]\nwidth = [4]\nrate = 1\n')
    assert config_file.arguments(path, Outer, []) == ["--data", "a", "--als.widths", "4", "--als.rate", "1"]
    (warning,) = caplog.messages
    assert path in warning
    assert "'als.width' is deprecated" in warning
    assert "use 'als.widths'" in warning
    path = write(tmp_path, 'data = "a"\n[solver]\nrate = 1\n')  # the name of a section
    assert config_file.arguments(path, Outer, []) == ["--data", "a", "--als.rate", "1"]
    path = write(tmp_path, 'data = "a"\n[als]\nwidth = [4]\nwidths = [4]\n')
    with pytest.raises(InputError, match=r"'als.widths' is set twice"):
        config_file.arguments(path, Outer, [])


def test_a_file_may_start_with_a_byte_order_mark(tmp_path):
    path = tmp_path / "run.toml"
    path.write_bytes(b'\xef\xbb\xbfdata = "a"\n')
    assert config_file.arguments(str(path), Outer, []) == ["--data", "a"]


def test_the_command_line_overrides_a_deprecated_option_of_a_file(tmp_path, monkeypatch):
    monkeypatch.setattr(config_file, "RENAMED", {"als.width": "als.widths"})
    path = write(tmp_path, "[als]\nwidth = [4]\n")
    assert config_file.arguments(path, Outer, ["--als.widths", "5"]) == ["--als.widths", "5"]


def test_deprecated_options_of_the_command_line_are_accepted_with_a_warning(monkeypatch, caplog):
    monkeypatch.setattr(config_file, "RENAMED", {"als.width": "als.table_widths", "als.loud": "als.verbose"})
    given = ["--als.width", "4", "--als.width=5", "--train.als.no-loud", "--als.widths", "als.width"]
    current = ["--als.table-widths", "4", "--als.table-widths=5", "--train.als.no-verbose", "--als.widths", "als.width"]
    assert config_file.current_arguments(given) == current
    assert len(caplog.messages) == 3
    assert "--train.als.no-loud is deprecated" in caplog.messages[2]
    assert "use --train.als.no-verbose" in caplog.messages[2]
    monkeypatch.setenv("RANK", "1")
    config_file.current_arguments(given)
    assert len(caplog.messages) == 3


@pytest.mark.parametrize(
    "given",
    [
        ["--stream.lanes", "2", "--stream.interleave", "3"],
        ["--stream.interleave=3", "--stream.lanes=2"],
        ["--follow.no-online", "--follow.on"],
    ],
)
def test_an_option_under_both_names_is_refused(given, capsys):
    assert main(["check", "train", "--data", "a", "--out", "b", *given]) == 2
    assert "is set twice, once by its old name" in capsys.readouterr().err
    assert main(["check", "train", "--data", "a", "--out", "b", "--stream.lanes=2", "--stream.lanes=3"]) == 0


@pytest.mark.parametrize(
    ("command", "option"),
    [
        ("train", "--stream.lanes=4"),
        ("train", "--stream.ready=0"),
        ("train", "--stream.threads=2"),
        ("train", "--follow.on"),
        ("pipeline", "--train.stream.lanes=4"),
        ("train", "--model.tables.strategy=init-freeze-plus"),
        ("train", "--model.tables.plus-dim=8"),
        ("pipeline", "--train.model.tables.strategy=init-train"),
        ("pipeline", "--hash.power=1"),
        ("hash", "--private=0.5"),
        ("hash", "--power=1"),
        ("hash", "--ways=2"),
        ("plan", "--ways=2"),
        ("compare hash", "--powers=1"),
    ],
)
def test_every_deprecated_option_still_works(command, option, capsys):
    out = [] if command == "plan" else ["--out", "b"]
    assert main(["check", *command.split(), "--data", "a", *out, option]) == 0
    assert "is deprecated" in capsys.readouterr().err


def test_deprecated_values_are_accepted_with_a_warning(tmp_path, caplog):
    given = [
        "--model.tables.strategy",
        "init-freeze",
        "--train.model.tables.strategy=init-train",
        "--out",
        "init-freeze",
    ]
    current = ["--model.tables.strategy", "frozen", "--train.model.tables.strategy=warm-start", "--out", "init-freeze"]
    assert config_file.current_arguments(given) == current
    assert caplog.text.count("is deprecated") == 2
    stored = {"tables": {"strategy": "init-freeze-plus", "plus_dim": 4}, "strategy": "init-train"}
    assert config_file.current_names(stored, "a.toml", warn=True) == {
        "tables": {"strategy": "frozen+residual", "residual_dim": 4},
        "strategy": "init-train",
    }
    assert "'tables.strategy = init-freeze-plus' is deprecated" in caplog.text


def test_a_name_without_a_section_is_not_renamed_within_one():
    assert config_file.current_arguments(["--negatives.power", "1"]) == ["--negatives.power", "1"]


def test_stored_configurations_get_current_names():
    stored = {"stream": {"lanes": 8, "shuffle": True}, "follow": {}, "train": {"stream": {"threads": 1}}}
    assert config_file.current_names(stored) == {
        "stream": {"interleave": 8, "shuffle": True},
        "follow": {},
        "train": {"stream": {"num_threads": 1}},
    }


def test_a_config_error_exits_2_in_one_line(tmp_path, capsys):
    path = write(tmp_path, "[als]\nfactrs = 3\n")
    assert main(["factorize", "--config", path, "--data", "a", "--out", "b"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "als.factors" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian", "--data", "x"], "unknown command 'trian'; nearest is 'train'"),
        (["xyzzy"], "unknown command 'xyzzy'; `recpress --help` lists the commands"),
        (["bench", "--help"], "'bench': expected one of bench list, bench run, bench page"),
        (["factorize", "--data", "a", "--out", "b", "--als.factrs", "3"], "--als.factrs, 3; nearest: --als.factors"),
        (["train", "--data", "a", "--out", "b", "--epochs", "x"], "Error parsing --epochs: invalid literal for int()"),
        (["train", "--data", "a", "--out", "b", "--epochs=-1"], "error: epochs is -1, expected at least 0"),
        (["bench", "run"], "error: expected names of benchmarks"),
        (["train", "--data", "a", "--out", "b", "--epochs"], "Missing value for argument '--epochs'"),
        (["train", "--data", "a", "--out", "b", "--device", "tpu"], "invalid choice 'tpu'"),
        (
            ["train", "--epoch", "3"],
            "Missing from recpress train: --data STR, --out STR; Unrecognized options: --epoch",
        ),
        (["--log-format", "xml", "train"], "log format is 'xml', expected one of text, json"),
        (["train", "--log-format"], "--log-format: expected one argument"),
        (["completion", "cmd"], "expected `recpress completion SHELL`"),
    ],
)
def test_an_invalid_command_line_is_one_line_on_stderr_and_status_2(arguments, message, capsys):
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert message in err
    assert err.startswith("recpress: error: ")
    assert err.count("\n") == 1
    assert not out


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name, capsys):
    with pytest.raises(SystemExit) as stop:
        main([*name.split(), "--help"])
    assert stop.value.code == 0
    short = capsys.readouterr().out
    assert "--" in short
    assert short.count("\n") <= 120
    assert "╭" not in short  # the boxes of the full help
    with pytest.raises(SystemExit) as stop:
        main([*name.split(), "--help-all"])
    assert stop.value.code == 0
    full = capsys.readouterr().out
    assert len(full) >= len(short) / 2  # the same options, in a narrower terminal
    for option in COMMANDS[name].main.split():
        assert f"--{option}" in short
        assert f"--{option}" in full


def test_the_short_help_begins_with_required_options_and_counts_the_others(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    lines = capsys.readouterr().out.splitlines()
    main_options = lines[lines.index("main options:") + 1 :]
    assert main_options[0] == "  --data STR"
    assert "(required)" in main_options[1]
    assert any(line.split()[:2] == ["--optimizer.*", "8"] for line in lines)


def test_a_log_format_is_taken_anywhere_and_only_before_two_dashes(monkeypatch, capsys):
    monkeypatch.setenv("RECPRESS_LOG_FORMAT", "")
    assert main(["train", "--data", "a", "--log-format", "json", "--out", "b", "--epochs=-1"]) == 2
    line = json.loads(capsys.readouterr().err)
    assert (line["level"], line["stage"], line["rank"]) == ("error", "train", 0)
    assert "epochs is -1" in line["message"]
    monkeypatch.setenv("RECPRESS_LOG_FORMAT", "")
    assert main(["check", "bench", "run", "all", "--", "--log-format", "other"]) == 0


def test_the_version_names_the_set(capsys):
    assert main(["--version"]) == 0
    assert re.fullmatch(r"recpress .*\(torch 2\.\S+, torchrec \S+, fbgemm-gpu \S+\)\n", capsys.readouterr().out)


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_completion_knows_commands_and_options(shell, capsys):
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    for word in ("factorize", "cadc", "--checkpoint.minutes"):
        assert word in script


def test_bash_completes_commands_and_options(tmp_path):
    program = """
        source "$1"
        COMP_WORDS=(recpress compare ca); COMP_CWORD=2; _tyro_recpress; echo "${COMPREPLY[@]}"
        COMP_WORDS=(recpress train --checkpoint.mi); COMP_CWORD=2; _tyro_recpress; echo "${COMPREPLY[@]}"
    """
    script = tmp_path / "completion"
    with script.open("w") as file:
        subprocess.run([*CLI, "completion", "bash"], stdout=file, check=True)
    done = subprocess.run(["bash", "-c", program, "-", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["cadc", "--checkpoint.minutes"]


@pytest.mark.parametrize("arguments", [["train", "--help-all"], ["bench", "list"]])
def test_a_closed_pipe_ends_the_command_without_a_message(arguments):
    process = subprocess.Popen([*CLI, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    err = process.stderr.read()
    assert process.wait(timeout=120) == 128 + signal.SIGPIPE
    assert b"pipe" not in err.lower()


def test_a_set_that_does_not_match_stops_the_command(monkeypatch, capsys, tmp_path):
    installed = {"torch": "2.13.0", "torchrec": "1.6.1", "fbgemm-gpu": "1.8.0"}
    monkeypatch.setattr("recpress.trainer.versions.installed_set", lambda: installed)
    assert main(["split", "--data", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "versions do not match: torch 2.13.0, torchrec 1.6.1" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["--version"],
        ["trian"],
        ["bench", "list"],
        ["train", "--help"],
        ["train", "--help-all"],
        ["train", "--config", "none.toml"],
        ["train", "--nothing"],
    ],
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
        "builders = ('batch', 'keyed', 'keyed_features')\n"
        "for module in pkgutil.walk_packages(recpress.data.__path__, 'recpress.data.'):\n"
        "    if module.name.rpartition('.')[2] not in builders: importlib.import_module(module.name)\n"
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
