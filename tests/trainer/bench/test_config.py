"""The list of benchmarks."""

import pytest

from recpress.trainer.bench.config import benchmarks


@pytest.mark.parametrize("name", benchmarks())
def test_a_benchmark_takes_an_output_file_and_the_arguments_of_its_sizes(name):
    benchmark = benchmarks()[name]
    source = benchmark.path.read_text()
    flags = [word for word in (*benchmark.small, *benchmark.full) if word.startswith("--")]
    assert "arguments(__doc__)" in source or '"--out"' in source or '("out"' in source
    for flag in flags:
        assert f'"{flag}"' in source or f'("{flag[2:]}"' in source, flag
