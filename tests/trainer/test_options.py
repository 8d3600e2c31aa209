"""Parsing of options: errors of one line, and the short help."""

from __future__ import annotations

from dataclasses import dataclass, field, make_dataclass

import pytest

from recpress.data.config import StreamConfig
from recpress.data.errors import InputError
from recpress.trainer.options import parse


@dataclass(frozen=True)
class Section:
    """A section. With a second sentence."""

    rate: float = 0.5
    """Rate, whose description is long
    enough for two lines."""
    kind: str = "a"
    """Kind."""


Many = make_dataclass("Many", [(f"option_{i}", int, 0) for i in range(30)])


@dataclass(frozen=True)
class Small:
    data: str
    """Input."""
    section: Section = field(default_factory=Section)

    def __post_init__(self) -> None:
        if self.data == "bad":
            raise InputError("data is 'bad', expected good")


@dataclass(frozen=True)
class Large(Small):
    many: Many = field(default_factory=Many)  # type: ignore[valid-type]


def parsed(config: type, *arguments: str, main: tuple[str, ...] = ()) -> object:
    return parse(config, arguments, prog="recpress x", summary="do x", main=main)


def test_options_are_parsed() -> None:
    assert parsed(Small, "--data", "d", "--section.rate", "2") == Small("d", Section(rate=2.0))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Missing from recpress x: --data STR (see recpress x --help)"),
        (
            ["--data", "d", "--section.rat", "3"],
            "Unrecognized options: --section.rat, 3; nearest: --section.rate FLOAT",
        ),
        (
            ["--data", "d", "--section.rate", "x"],
            "Error parsing --section.rate: could not convert string to float: 'x'",
        ),
        (["--data", "bad"], "data is 'bad', expected good (see recpress x --help)"),
    ],
)
def test_an_error_is_one_line(arguments: list[str], message: str) -> None:
    with pytest.raises(InputError) as error:
        parsed(Small, *arguments)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@dataclass(frozen=True)
class Streamed(Small):
    stream: StreamConfig = field(default_factory=StreamConfig)


@pytest.mark.parametrize(
    ("config", "option", "nearest"),
    [
        (Streamed, "--stream.lane", "--stream.interleave"),  # close to the old name alone, stream.lanes
        (Streamed, "--streem.bach", "--stream.batch-size"),
        (Small, "--stream.lane", None),
        (Small, "--qqqqq", None),
    ],
)
def test_a_misspelled_option_has_a_suggestion(config: type, option: str, nearest: str | None) -> None:
    with pytest.raises(InputError) as error:
        parsed(config, "--data", "d", option, "3")
    expected = [f"{nearest} (see recpress x --help)"] if nearest else []
    assert str(error.value).split("nearest: ")[1:] == expected
    with pytest.raises(InputError, match=r"Missing from recpress x: --data STR; Unrecognized options") as error:
        parsed(config, option, "3")
    assert str(error.value).split("nearest: ")[1:] == expected


def help_of(config: type, option: str, capsys: pytest.CaptureFixture[str], main: tuple[str, ...] = ()) -> str:
    with pytest.raises(SystemExit) as stop:
        parsed(config, option, main=main)
    assert not stop.value.code
    return capsys.readouterr().out


def test_a_command_whose_options_are_all_listed_names_no_others(capsys: pytest.CaptureFixture[str]) -> None:
    shown = help_of(Section, "--help", capsys)
    assert "Do x." in shown
    words = " ".join(shown.partition("\noptions:")[2].split())
    assert words == (
        "--rate FLOAT Rate, whose description is long enough for two lines. (default: 0.5) "
        "--kind STR Kind. (default: a)"
    )


def test_a_command_with_many_shows_the_main_ones_and_counts_the_others(capsys: pytest.CaptureFixture[str]) -> None:
    shown = help_of(Large, "--help", capsys, ("section.rate", "data"))
    head, _, others = shown.partition("more options, which `recpress x --help-all` describes:")
    _, _, first = head.partition("main options:")
    words = " ".join(first.split())
    assert words == (  # required ones first
        "--data STR Input. (required) --section.rate FLOAT Rate, whose description is long enough for two lines. "
        "(default: 0.5)"
    )
    assert " ".join(others.split()).startswith("--section.* 2 A section --many.* 30")
    assert "--many.option-7" in help_of(Large, "--help-all", capsys)
