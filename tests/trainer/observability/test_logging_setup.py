"""Log lines of the command line, and silence as a library."""

import json
import logging
import subprocess
import sys

import pytest

from recpress.trainer.observability.logging_setup import VARIABLE, logging_to_stderr, stage_name

LOG = logging.getLogger("recpress.trainer.some.module")


@pytest.fixture(autouse=True)
def no_environment(monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.delenv("RANK", raising=False)


def test_a_text_line_has_time_stage_and_level(capsys, monkeypatch):
    with logging_to_stderr("train"):
        LOG.info("resuming from checkpoint %s", "x")
        LOG.warning("skipping corrupt row group")
        LOG.info("train: 23 of 115 steps")
        monkeypatch.setenv("RANK", "3")
        with stage_name("evaluate"):
            LOG.info("done")
        LOG.error("no such file")
    lines = capsys.readouterr().err.splitlines()
    assert [line[9:] for line in lines[:4]] == [
        "train: resuming from checkpoint x",
        "train: warning: skipping corrupt row group",
        "train: 23 of 115 steps",
        "evaluate [rank 3]: done",
    ]
    assert lines[0][2] == lines[0][5] == ":"
    assert lines[4] == "recpress [rank 3]: error: no such file"


def test_json_lines_have_fields(capsys, monkeypatch):
    monkeypatch.setenv(VARIABLE, "json")
    monkeypatch.setenv("RANK", "1")
    with logging_to_stderr("train"):
        LOG.info("ümlaut \n line")
        try:
            raise KeyError("x")
        except KeyError as error:
            LOG.error("bug", exc_info=error)
    first, second = (json.loads(line) for line in capsys.readouterr().err.splitlines())
    assert first.pop("time").endswith("+00:00")
    assert first == {
        "level": "info",
        "stage": "train",
        "rank": 1,
        "logger": "recpress.trainer.some.module",
        "message": "ümlaut \n line",
    }
    assert "KeyError" in second["exception"]


def test_the_setup_of_the_host_is_left_as_it_was(capsys):
    ours = logging.getLogger("recpress")
    before = (list(logging.root.handlers), list(ours.handlers), ours.level, ours.propagate)
    with logging_to_stderr("train"):
        pass
    assert (list(logging.root.handlers), list(ours.handlers), ours.level, ours.propagate) == before


@pytest.mark.parametrize("console", [True, False])
def test_a_line_appears_once_in_a_host_that_logs(console):
    """A host that logs to the console gets no second copy there; one that logs elsewhere gets its lines."""
    stream = "sys.stderr" if console else "io.StringIO()"
    program = f"""
import io, logging, sys
handler = logging.StreamHandler({stream})
logging.basicConfig(level=logging.INFO, handlers=[handler], format="%(message)s")
from recpress.trainer.observability.logging_setup import logging_to_stderr
with logging_to_stderr("train"):
    logging.getLogger("recpress.x").info("said")
    logging.getLogger("host").info("host")
print(handler.stream.getvalue() if {not console} else "")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stderr.count("said") == 1
    assert done.stdout.split() == ([] if console else ["said", "host"])


def test_a_library_is_silent():
    program = "import logging, recpress.data; logging.getLogger('recpress.data.x').warning('said')"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout + done.stderr == ""
