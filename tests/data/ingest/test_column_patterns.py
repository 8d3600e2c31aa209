"""Patterns of column names."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recpress.data.config import IngestConfig
from recpress.data.dataset.log import open_log
from recpress.data.errors import InputError
from recpress.data.ingest.convert import ingest

COLUMNS = {"C10": ["a"], "user_id": [1], "C2": ["b"], "I1": [1.5], "item_id": [2], "I2": [2.5], "C9": [3], "label": [1]}


@pytest.fixture(params=["parquet", "csv"])
def table(tmp_path, request):
    path = tmp_path / f"log.{request.param}"
    if request.param == "parquet":
        pq.write_table(pa.table(COLUMNS), path)
    else:
        path.write_text(";".join(COLUMNS) + "\n" + ";".join(str(value) for [value] in COLUMNS.values()) + "\n")
    return str(path)


def schema(table, tmp_path, **options):
    return open_log(ingest(IngestConfig(input=table, label="label", **options), tmp_path / "log"), pairs=False).schema


def test_a_pattern_is_the_columns_that_match_in_the_order_of_the_file(table, tmp_path):
    found = schema(table, tmp_path, categorical=("C9", "C*"), floats=("I[12]",))
    assert found.categorical == ("C9", "C10", "C2")
    assert found.floats == ("I1", "I2")


def test_columns_with_another_role_match_no_pattern(table, tmp_path):
    assert schema(table, tmp_path, categorical=("*",), floats=("I1", "I2")).categorical == ("C10", "C2", "C9")


@pytest.mark.parametrize(
    ("categorical", "message"),
    [(("D*",), "no column without another role matches 'D\\*'; found C10"), (("C*", "?2"), "'C2' matches both")],
)
def test_patterns_that_cannot_be_used(table, tmp_path, categorical, message):
    with pytest.raises(InputError, match=message):
        schema(table, tmp_path, categorical=categorical)


def test_json_lines_need_names(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"user_id": 1, "item_id": 2, "C1": "a"}\n')
    with pytest.raises(InputError, match=r"'C\*' is a pattern; expected names"):
        ingest(IngestConfig(input=str(tmp_path / "log.jsonl"), categorical=("C*",)), tmp_path / "log")
