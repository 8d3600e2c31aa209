"""MovieLens-1M as a click log: a rating of 4 or 5 is a click; random 80/10/10 split; features of users and items.

Used by `click_cadc.py` and `click_hash.py`. Reads `ratings.parquet`, `users.parquet` and `items.parquet`. From the
public files, `recpress ingest` makes a log with the same features, and `recpress train --label-threshold 4` makes the
clicks.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

POSITIVE = 4
SPLIT = {"train": 0.8, "val": 0.1, "test": 0.1}


def codes(column: pa.ChunkedArray | pa.Array) -> np.ndarray:
    """Values numbered from 0, in ascending order of the values."""
    return np.unique(column.to_numpy(zero_copy_only=False), return_inverse=True)[1]


def click_log(source: str | Path, out: str | Path, *, seed: int = 0, rows: int = 0) -> Path:
    """Write the log to the folder `out`, which must not exist.

    Args:
        seed: of the split.
        rows: first ratings only; 0: all.
    """
    source, out = Path(source), Path(out)
    ratings = pq.read_table(source / "ratings.parquet")
    ratings = ratings.slice(0, rows or ratings.num_rows)
    users, items = (pq.read_table(source / f"{side}s.parquet") for side in ("user", "item"))
    known = {"user": np.sort(users["user_id"].to_numpy()), "item": np.sort(items["item_id"].to_numpy())}
    user = np.searchsorted(known["user"], ratings["user_id"].to_numpy())
    item = np.searchsorted(known["item"], ratings["item_id"].to_numpy())
    label = (ratings["rating"].to_numpy() >= POSITIVE).astype(np.int8)
    part = np.random.default_rng(seed).choice(len(SPLIT), len(label), p=list(SPLIT.values()))
    out.mkdir(parents=True)
    for number, name in enumerate(SPLIT):
        kept = part == number
        table = pa.table({"user_id": user[kept], "item_id": item[kept], "label": label[kept]})
        pq.write_table(table, out / f"{name}.parquet", row_group_size=1 << 15)
    users, items = users.sort_by("user_id"), items.sort_by("item_id")
    of_user = {name: codes(users[name]) for name in ("gender", "age", "occupation")}
    pq.write_table(pa.table(of_user), out / "users.parquet")
    genres = items["genres"].combine_chunks()
    numbered = pa.array(codes(genres.flatten()), pa.int64())
    lists = pa.ListArray.from_arrays(genres.offsets, numbered)
    decade = pc.divide(pc.subtract(items["year"], 1900), 5)
    pq.write_table(pa.table({"genres": lists, "year": codes(decade)}), out / "items.parquet")
    return out
