"""Artifacts that ranks write together, and for which log, rows and ids factors are."""

from types import SimpleNamespace

import pytest
import torch.distributed as dist

from recpress.data.config import SampleConfig
from recpress.data.dataset import artifact
from recpress.data.errors import InputError
from recpress.trainer.artifacts.factors import (
    FACTORS,
    FactorsArtifact,
    claimed,
    describe_log,
    open_factors,
    shared_artifact,
)
from tests.ranks import run_on_ranks

SAMPLE = SampleConfig(rate=0.1, seed=3)


def log(users=4, vocabulary="a", content="x", sample_of=None):
    return SimpleNamespace(
        path="log",
        num_users=users,
        num_items=3,
        train=SimpleNamespace(num_rows=9),
        vocabulary_fingerprint=lambda side: f"{vocabulary}-{side}",
        inputs=lambda: [{"size": 5, "fingerprint": content}],
        sample_of=sample_of,
    )


def factors(made_from, crossfit=SAMPLE):
    sample = None if crossfit is None else vars(crossfit)
    return FactorsArtifact("factors", {"log": describe_log(made_from), "crossfit": sample, "dim": 8})


def test_factors_are_for_the_ids_of_one_log(tmp_path):
    staging = artifact.begin(tmp_path / "f", kind=FACTORS)
    artifact.commit(staging, tmp_path / "f", FACTORS, {"log": describe_log(log()), "crossfit": None, "dim": 8})
    assert open_factors(str(tmp_path / "f"), log()).dim == 8
    with pytest.raises(InputError, match=r"f: made for 4 users \(log\), but log has 5"):
        open_factors(str(tmp_path / "f"), log(users=5))
    with pytest.raises(InputError, match=r"f: made for another user vocabulary than that of log"):
        open_factors(str(tmp_path / "f"), log(vocabulary="b"))


def test_which_samples_the_cross_fitted_factors_have_not_seen():
    made = factors(log())
    assert made.has_not_seen(log(), SAMPLE)
    assert not made.has_not_seen(log(), SampleConfig(rate=0.1, seed=4))
    assert not factors(log(), crossfit=None).has_not_seen(log(), SAMPLE)
    # a log that is that sample of their own log, or another sample, or a sample of another log
    files = [{"size": 5, "fingerprint": "x"}]
    for drawn, of, expected in (
        (SAMPLE, files, True),
        (SampleConfig(rate=0.2, seed=3), files, False),
        (SAMPLE, [{"size": 5, "fingerprint": "y"}], False),
    ):
        part = log(content="part", sample_of={"sample": vars(drawn), "files": of})
        assert made.has_not_seen(part, SampleConfig()) is expected


def shared(folder, fails):
    rank, meta = dist.get_rank(), {"dim": 3}
    found = []
    for name in ("good", "bad"):
        try:
            with claimed(f"{folder}/{name}"), shared_artifact(f"{folder}/{name}", FACTORS, meta) as tmp:
                (tmp / f"part-{rank}").write_text(str(rank))
                if name == "bad" and rank == fails:
                    raise InputError("no")
        except InputError as error:
            found.append(str(error))
    return found


def test_all_ranks_write_one_artifact_or_none(tmp_path):
    run_on_ranks(shared, 1, str(tmp_path), -1)
    assert artifact.read_manifest(tmp_path / "good", FACTORS)["dim"] == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad", "good"]
    assert run_on_ranks(shared, 1, str(tmp_path / "more"), 0)[0] == ["no"]
    assert [path.name for path in (tmp_path / "more").iterdir()] == ["good"]  # nothing of the other is left
