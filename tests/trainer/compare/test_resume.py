"""A stopped `compare cadc` or `compare both` loads its finished runs, and finds the same."""

from dataclasses import replace

import pytest

from recpress.data.errors import InputError
from recpress.trainer.compare import resume
from recpress.trainer.compare.both import compare_both
from recpress.trainer.compare.cadc import compare_cadc
from recpress.trainer.errors import Preempted, Signalled
from tests.trainer.compare.configs import both_config, cadc_config

pytestmark = pytest.mark.slow  # trains models


def counted(patch, stop_at=0):
    """Outputs of the factorizations and networks that are computed; a signal stops the `stop_at`-th one."""
    calls = []

    def wrap(stage):
        def call(config):
            if len(calls) + 1 == stop_at:
                raise Signalled(15, "SIGTERM")
            calls.append(config.out.rsplit("out.checkpoints/")[-1])
            return stage(config)

        return call

    for name in ("factorize", "train"):
        patch.setattr(resume, name, wrap(getattr(resume, name)))
    return calls


def small_cadc(out):
    return replace(cadc_config(out), strategies=("random-all", "cadc"), seeds=(0,), trials=1, bpr=False)


def small_both(out):
    return both_config(out, levels=(1.0, 0.17), seeds=(0, 1))


def run(compare, config, stop_at=0):
    with pytest.MonkeyPatch.context() as patch:
        calls = counted(patch, stop_at)
        return compare(config), calls


@pytest.mark.parametrize(("compare", "make", "stop_at"), [(compare_cadc, small_cadc, 5), (compare_both, small_both, 4)])
def test_a_stopped_comparison_loads_finished_runs_and_finds_the_same(compare, make, stop_at, tmp_path):
    straight, calls = run(compare, make(tmp_path / "straight" / "out"))
    assert len(calls) > stop_at
    assert [path.name for path in (tmp_path / "straight").iterdir()] == ["out"]
    assert not (tmp_path / "straight" / "out" / "comparison.json").exists()

    folder, config = tmp_path / "out.checkpoints", make(tmp_path / "out")
    with pytest.raises(Preempted, match="stopped by SIGTERM; rerun the same command to resume"):
        run(compare, config, stop_at)
    assert not (tmp_path / "out").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"straight", "out.checkpoints"}
    with pytest.raises(InputError, match=r"other settings \(als, seeds\)"):
        compare(replace(config, seeds=(7,), als=replace(config.als, sweeps=1)))
    assert folder.exists()

    resumed, again = run(compare, config)
    assert again == calls[stop_at - 1 :]
    assert not folder.exists()
    if compare is compare_cadc:
        for method in straight.methods:
            found = resumed.method(method.key)
            assert [seed.metrics for seed in found.seeds] == [seed.metrics for seed in method.seeds]
            assert [point.metrics for point in found.curve] == [point.metrics for point in method.curve]
            assert (found.rows, found.table_bytes) == (method.rows, method.table_bytes)
            assert found.parts.keys() == method.parts.keys()
        assert resumed.differences == straight.differences
    else:
        for one, other in zip(straight.points, resumed.points, strict=True):
            assert one == other


def test_an_error_before_the_first_run_leaves_nothing(tmp_path):
    config = both_config(tmp_path / "out", data=str(tmp_path / "nowhere"))
    with pytest.raises(InputError, match="nowhere"):
        compare_both(config)
    assert not any(tmp_path.iterdir())
