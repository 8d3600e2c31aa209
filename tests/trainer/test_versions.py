"""Which sets of torch, torchrec and fbgemm a command starts with."""

import logging

import pytest

from recpress.data.errors import InputError
from recpress.trainer.versions import check_set, installed_set, versions


def found(torch, torchrec, fbgemm):
    return {"torch": torch, "torchrec": torchrec, "fbgemm-gpu": fbgemm}


@pytest.mark.parametrize(
    "versions",
    [
        ("2.13.0+cpu", "1.8.0", "1.8.0"),
        ("2.13.1", "1.8.2", "1.8.0"),
        ("2.11.0", "1.6.1", "1.6.0"),
        ("2.13.0", None, None),
    ],
)
def test_a_known_set_passes_in_silence(versions, caplog):
    check_set(found(*versions))
    assert not caplog.records


@pytest.mark.parametrize(
    "versions",
    [
        ("2.13.0", "1.6.0", "1.8.0"),
        ("2.13.0", "1.8.0", "1.6.0"),
        ("2.11.0", "1.8.0", "1.8.0"),
        ("2.12.0", "1.8.0", "1.8.0"),
        ("2.14.0", "1.8.0", "1.9.0"),
        ("2.13.0", "1.9.0", "1.9.0"),
        ("2.4.0", "0.8.0", "0.8.0"),
    ],
)
def test_a_mixed_or_old_set_is_one_error_that_names_what_fits(versions):
    with pytest.raises(InputError) as error:
        check_set(found(*versions))
    assert f"torch {versions[0]}, torchrec {versions[1]}" in str(error.value)
    assert "expected torch 2.13, torchrec 1.8, fbgemm-gpu 1.8 or torch 2.11" in str(error.value)


def test_a_newer_set_is_a_warning_of_rank_0(caplog, monkeypatch):
    with caplog.at_level(logging.WARNING):
        check_set(found("2.14.0", "1.9.0", "1.9.0"))
        monkeypatch.setenv("RANK", "1")
        check_set(found("2.14.0", "1.9.0", "1.9.0"))
    assert [record.getMessage().split(":")[0] for record in caplog.records] == ["untested versions"]


def test_the_installed_set_is_known():
    check_set()
    assert all(installed_set().values())
    assert versions()["torch"] == installed_set()["torch"]
