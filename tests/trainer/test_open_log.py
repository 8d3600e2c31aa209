"""Stages that read a damaged log with `--on-bad-file skip`: what they make is what the rest of the log gives."""

import json
import logging
import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recpress.data.config import SampleConfig, Schema
from recpress.data.dataset.log import open_log
from recpress.data.errors import InputError
from recpress.modules.als.factors import FactorTable
from recpress.modules.config import ALSConfig, LogisticConfig
from recpress.trainer.artifacts.id_maps import open_maps
from recpress.trainer.cli import main
from recpress.trainer.compare.config import CompareBothConfig, CompareCadcConfig
from recpress.trainer.config import NetworkConfig, StreamConfig
from recpress.trainer.factorize.config import FactorizeConfig
from recpress.trainer.factorize.stage import factorize
from recpress.trainer.hash.config import HashStageConfig
from recpress.trainer.hash.stage import make_maps
from recpress.trainer.prepare.config import SampleCommand
from recpress.trainer.prepare.stages import sample
from tests.ranks import run_on_ranks

GROUP, GROUPS, FILES = 60, 4, 3
USERS, ITEMS = 30, 20
ALS = ALSConfig(factors=4, sweeps=3, auto=False)
SKEWED = np.random.default_rng(0).permutation(USERS) ** 2 % USERS  # so that ids differ in count


def group(number):
    """A row group; each has all users and items."""
    row = np.arange(number * GROUP, (number + 1) * GROUP)
    user = np.where(row % 2, row // 2 % USERS, SKEWED[row % USERS])
    return pa.table({"user_id": user, "item_id": (row * (1 + row // USERS)) % ITEMS, "row": row})


def write(folder, without=()):
    """A log without these row groups, numbered through all files."""
    folder.mkdir()
    for file in range(FILES):
        numbers = [n for n in range(file * GROUPS, (file + 1) * GROUPS) if n not in without]
        if numbers:
            pq.write_table(
                pa.concat_tables(map(group, numbers)), folder / f"train-{file}.parquet", row_group_size=GROUP
            )
    return folder


def damage(path, row_group, column=1):
    chunk = pq.read_metadata(path).row_group(row_group).column(column)
    with open(path, "r+b") as target:
        target.seek(chunk.dictionary_page_offset or chunk.data_page_offset)
        target.write(b"\xff" * chunk.total_compressed_size)


@pytest.fixture
def damaged(tmp_path, monkeypatch):
    """The first file has no footer, two row groups of the others do not decode."""
    monkeypatch.setenv("RECPRESS_CACHE", str(tmp_path / "cache"))
    folder = write(tmp_path / "damaged")
    os.truncate(folder / "train-0.parquet", 100)
    damage(folder / "train-1.parquet", 2)
    damage(folder / "train-2.parquet", 0)
    return folder


LOST = {0, 1, 2, 3, 6, 8}  # row groups


def manifest(folder):
    return json.loads((folder / "manifest.json").read_text())


def check(manifest, damaged, rows=2 * GROUP):
    assert list(manifest["bad_files"]) == [f"{damaged}/train-0.parquet"]
    assert (manifest["bad_row_groups"], manifest["lost_rows"]) == (2, rows)


def factors_of(log, out, **more):
    factorize(FactorizeConfig(data=str(log), out=str(out), als=ALS, crossfit_rate=0.3, device="cpu", **more))
    return [np.asarray(FactorTable(place, side)[:]) for place in (out, out / "crossfit") for side in ("user", "item")]


def test_factors_are_those_of_the_other_rows(damaged, tmp_path, caplog):
    caplog.set_level(logging.INFO, "recpress")
    with pytest.raises(InputError, match=r"train-0.parquet: incomplete or not a Parquet file"):
        factors_of(damaged, tmp_path / "factors")
    found = factors_of(damaged, tmp_path / "factors", on_bad_file="skip")
    assert "skipped what could not be read: 1 files, and 2 row groups of others, with 120 rows" in caplog.text
    check(manifest(tmp_path / "factors"), damaged)
    wanted = factors_of(write(tmp_path / "rest", LOST), tmp_path / "wanted")
    for side in (0, 1):  # which rows the cross-fitted ones leave out depends on the numbers of row groups
        np.testing.assert_allclose(found[side], wanted[side], atol=1e-5)
    assert np.isfinite(found[2]).all()


def on_two_ranks(damaged, out):
    factorize(FactorizeConfig(data=str(damaged), out=str(out), als=ALS, on_bad_file="skip", device="cpu"))


def test_ranks_count_each_lost_row_group_once(damaged, tmp_path):
    run_on_ranks(on_two_ranks, 2, damaged, tmp_path / "factors")
    check(manifest(tmp_path / "factors"), damaged)


def test_a_logistic_factorization_goes_on_too(damaged, tmp_path):
    config = LogisticConfig(factors=4, epochs=1)
    out = tmp_path / "factors"
    factorize(FactorizeConfig(data=str(damaged), out=str(out), method="logistic", logistic=config, on_bad_file="skip"))
    check(manifest(out), damaged)


def test_maps_are_those_of_the_other_rows(damaged, tmp_path):
    for log, out, skip in ((damaged, "maps", "skip"), (write(tmp_path / "rest", LOST), "wanted", "stop")):
        make_maps(
            HashStageConfig(data=str(log), out=str(tmp_path / out), method="frequency", share=0.5, on_bad_file=skip)
        )
    check(manifest(tmp_path / "maps"), damaged)
    found, wanted = (open_maps(str(tmp_path / out), None) for out in ("maps", "wanted"))
    for side in ("user", "item"):
        assert found.map(side).rows.tolist() == wanted.map(side).rows.tolist()


@pytest.mark.parametrize("shuffle", [False, True])
def test_a_written_sample_leaves_them_out(damaged, tmp_path, shuffle, caplog):
    caplog.set_level(logging.INFO, "recpress")
    drawn, schema = SampleConfig(rate=0.5, seed=1), Schema(floats=("row",))
    command = SampleCommand(
        data=str(damaged), out=str(tmp_path / "sample"), sample=drawn, on_bad_file="skip", shuffle=shuffle
    )
    sample(command)
    rest = open_log(write(tmp_path / "whole"), schema)
    kept = [part["row"] for part in _by_group(rest, drawn)]
    wanted = [kept[place] for place in range(len(kept)) if place not in LOST]
    new = pq.read_table(open_log(tmp_path / "sample").train.files[0].path)["row"].to_pylist()
    assert sorted(new) == np.concatenate(wanted).tolist()
    check(manifest(tmp_path / "sample"), damaged, len(kept[6]) + len(kept[8]))
    assert "skipped what could not be read: 1 files" in caplog.text


def _by_group(log, drawn):
    from recpress.data.sampling.selection import Selection

    selection = Selection(log.train, drawn)
    for place, group in enumerate(log.train.groups):
        read = log.train.read(group, ["row"])
        yield {"row": read["row"][selection.of(place)].astype(int)}


def test_a_sample_by_user_needs_all_row_groups(damaged, tmp_path):
    damage(damaged / "train-1.parquet", 2, column=0)
    drawn = SampleConfig(kind="user", rate=0.5)
    with pytest.raises(InputError, match=r"train-1.parquet, row group 2: cannot be read"):
        sample(SampleCommand(data=str(damaged), out=str(tmp_path / "sample"), sample=drawn, on_bad_file="skip"))


def test_where_nothing_can_be_read_there_is_an_error(tmp_path):
    folder = write(tmp_path / "log", set(range(GROUPS, FILES * GROUPS)))
    for row_group in range(GROUPS):
        damage(folder / "train-0.parquet", row_group)
    with pytest.raises(InputError, match="none of its 4 row groups can be read"):
        factorize(FactorizeConfig(data=str(folder), out=str(tmp_path / "factors"), als=ALS, on_bad_file="skip"))
    with pytest.raises(InputError, match="none of the row groups that have rows of the sample can be read"):
        sample(SampleCommand(data=str(folder), out=str(tmp_path / "sample"), on_bad_file="skip"))
    assert not (tmp_path / "factors").exists()


@pytest.mark.parametrize("command", ["evaluate", "split", "ingest", "compare hash"])
def test_other_stages_know_no_such_option(command, capsys):
    for option in ("--on-bad-file", "--stream.on-bad-file"):
        assert main(["check", *command.split(), option, "skip"]) == 2
        assert option in capsys.readouterr().err


def test_comparisons_refuse_it_by_name():
    network = NetworkConfig(stream=StreamConfig(on_bad_file="skip"))
    with pytest.raises(InputError, match=r"tuned.stream.on_bad_file is 'skip'; expected stop"):
        CompareCadcConfig(tuned=network)
    with pytest.raises(InputError, match=r"frozen.stream.on_bad_file is 'skip'; expected stop"):
        CompareBothConfig(frozen=network)


def taken_on_each_rank(folder):
    from recpress.data.dataset import artifact
    from recpress.trainer.artifacts.factors import describe_log
    from recpress.trainer.open_log import open_on_all_ranks

    taken = []
    plain = artifact.fingerprint
    artifact.fingerprint = lambda path, filesystem=None: taken.append(path) or plain(path, filesystem)
    try:
        log = open_on_all_ranks(folder, None, skip=False)
        return len(taken), describe_log(log)["files"], len(taken)
    finally:
        artifact.fingerprint = plain


def test_fingerprints_of_a_log_are_taken_by_one_rank(tmp_path):
    first, second = run_on_ranks(taken_on_each_rank, 2, str(write(tmp_path / "log")))
    assert (first[0], second[0]) == (FILES, 0)
    assert (first[2], second[2]) == (FILES, 0)
    assert first[1] == second[1]
    assert all(entry["fingerprint"] for entry in first[1])
