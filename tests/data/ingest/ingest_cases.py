"""Files as users have them, and what `ingest` makes of them."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recpress.data.config import IngestConfig
from recpress.data.dataset.log import open_log
from recpress.data.errors import InputError
from recpress.data.ingest.convert import ingest
from recpress.data.sampling.scan import iter_columns

HEAD = "user_id,item_id\n"
ROWS = HEAD + "1,2\n"


JSON_ROW = '{"user_id": 3, "item_id": 4}\n'
PARQUET = pa.table({"user_id": [5], "item_id": [6]})


ML_ROWS = "userId,movieId,rating,timestamp\n1,10,4.5,7\n"


def write(folder, **files):
    """Files by name, with `__` for a dot and `DIR___` for a folder; text, bytes, or a table for Parquet."""
    for name, content in files.items():
        path = folder / name.replace("___", "/").replace("__", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, pa.Table):
            pq.write_table(content, path)
        else:
            path.write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def made(source, tmp_path, **options):
    return open_log(ingest(IngestConfig(input=str(source), **options), tmp_path / "out"))


def raw_rows(log, *columns, part="train"):
    """Rows with raw ids, and further columns as they are stored."""
    table = pq.read_table(f"{log.path}/{part}")
    sides = []
    for side in ("user", "item"):
        raw = log.vocabulary(side).column("raw").to_pylist()
        sides.append([raw[k] for k in table.column(f"{side}_id").to_pylist()])
    return list(zip(*sides, *(table.column(name).to_pylist() for name in columns), strict=True))


def refused(source, tmp_path, *words, **options):
    with pytest.raises(InputError) as error:
        ingest(IngestConfig(input=str(source), **options), tmp_path / "out")
    message = str(error.value)
    assert "\n" not in message
    assert all(word in message for word in words), message
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith((".", "out"))]


def read_all(log, rows, columns):
    parts = list(iter_columns(rows, columns))
    return {name: np.concatenate([part[name] for part in parts]) for name in columns}
