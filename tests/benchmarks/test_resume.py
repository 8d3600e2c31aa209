"""Resuming in a long log."""

from recpress.benchmarks import readers, resume, synthetic_logs
from recpress.data.config import StreamConfig


def test_a_long_log_is_one_file_under_many_names(tmp_path):
    long = synthetic_logs.long(tmp_path, 2500, file_rows=1000)
    assert len(long.files) == 3
    config = StreamConfig(batch_size=100, num_threads=1)
    assert resume.ours(long, config)(17) == 100
    assert readers.ours(long, config)() == 3000
