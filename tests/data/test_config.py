"""Configuration of the data layer."""

import pytest

from recpress.data.config import IngestConfig, NegativesConfig, SampleConfig, StreamConfig
from recpress.data.errors import InputError


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SampleConfig(rate=0), "sample.rate is 0"),
        (lambda: NegativesConfig(kind="in-batch", shared=True), "negatives.shared"),
        (lambda: IngestConfig(input="a", encoding="latin-99"), "encoding is 'latin-99'"),
    ],
)
def test_invalid_values_are_named(make, message):
    with pytest.raises(InputError, match=message):
        make()


def test_threads_follow_the_cores_of_a_rank(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(16)), raising=False)
    assert StreamConfig().chosen_threads == 4
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert StreamConfig().chosen_threads == 2
    assert StreamConfig(num_threads=7).chosen_threads == 7
