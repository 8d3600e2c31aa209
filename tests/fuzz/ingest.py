"""Random bytes for `recpress ingest`: `python -m tests.fuzz.ingest --minutes 10 --seed 0`.

Small files of every format are damaged: bytes change, go, come twice, or are tokens that readers trip over. `ingest`
may refuse a file in one line, or write a log whose rows are those that an independent reader finds (Python's csv and
json, or a split of the lines). Anything else is a finding: another exception than InputError, other rows, something
left behind. Findings are printed and kept in --keep; the status is 1 if there are any. What is tried next is in
`--keep/current`, so that a crash of the process is a finding too.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import io
import json
import logging
import random
import re
import shutil
import sys
import tempfile
import time
import traceback
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from recpress.data.config import IngestConfig
from recpress.data.dataset import artifact
from recpress.data.dataset.log import open_log
from recpress.data.errors import InputError
from recpress.data.ingest.convert import ingest

Pairs = list[tuple[str, str]]
TOKENS = [
    *(b'"', b'""', b",", b"\t", b";", b"|", b"::", b"\n", b"\r\n", b"\r", b"\n\n", b" ", b"\0", b"\xff", b"\xc3\xa9"),
    *(b"\xc2\x85", b"\xef\xbb\xbf", b"\xff\xfe", b"007", b"7", b"-0", b"+5", b"1.0", b"1e5", b"nan", b"inf", b"1e400"),
    *(b"NULL", b"9223372036854775808", b"18446744073709551616", b"2024-01-01", b"2024-01-01T00:00:00Z", b"0001-01-01"),
    *(b"{", b"}", b"[", b"]", b"null", b"true", b"\\u0000", b"\\ud800", b'\\"', b"PAR1"),
]
CSV = (
    b"user_id,item_id,r,t,c\n1,10,5,1700000000,red\n2,20,4.5,1700000001,"
    b'"a, ""b"""\n3,x7,1,1700000002,\n1,20,2,1700000003,blue\n'
)
UNQUOTED = CSV.replace(b'"a, ""b"""', b'"a" b')
TSV = UNQUOTED.replace(b",", b"\t")
JSON = b"".join(
    json.dumps({"user_id": u, "item_id": i, "r": r, "t": 1700000000 + u, "c": c}).encode() + b"\n"
    for u, i, r, c in [
        (1, "10", 5, "red"),
        (2, "20", 4.5, 'a, "b"'),
        (3, "x\u00e97", 1, None),
        (1, "20", 2.25, "\u2028"),
    ]
)
RATINGS = b"1::10::5::978300760\n2::20::4.5::978300761\n2::10::3::978300762\n"
MOVIES = "10::Caf\u00e9: One (1999)::Drama|Comedy\n20::Two (2000)::Action\n".encode("latin-1")
USERS = b"1::F::1::10::48067\n2::M::56::16::70072\n"


def tables() -> bytes:
    out = io.BytesIO()
    table = pa.table(
        {
            "user_id": [1, 2, 3, 1],
            "item_id": ["10", "20", "x7", "20"],
            "r": [5.0, 4.5, 1.0, 2.0],
            "t": pa.array([1700000000, 1700000001, 1700000002, 1700000003], pa.timestamp("us")),
            "c": pa.array([["red"], [], None, ["blue", "red"]]),
        }
    )
    pq.write_table(table, out, row_group_size=2, write_page_checksum=True)
    return out.getvalue()


def zipped(blob: bytes) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("a.csv", blob)
    return out.getvalue()


NAMED: dict[str, Any] = {"label": "r", "time": "t", "categorical": ("c",)}
SEEDS: dict[str, tuple[dict[str, bytes], dict[str, Any]]] = {
    "csv": ({"a.csv": CSV}, NAMED),
    "csv without header": ({"a.csv": CSV.split(b"\n", 1)[1]}, {"columns": ("user_id", "item_id", "r", "t", "c")}),
    "csv of two files": ({"a.csv": CSV, "b.csv": b"t,item_id,user_id\n5,007,9\n"}, {"time": "t"}),
    "csv unquoted": ({"a.csv": UNQUOTED}, {"quoting": "off", "label": "r"}),
    "csv split": ({"a.csv": b"user_id,item_id,s\n1,2,train\n3,4,test\n5,6,val\n"}, {"split_column": "s"}),
    "tsv": ({"a.tsv": TSV}, NAMED),
    "json": ({"a.json": JSON}, NAMED),
    "csv.gz": ({"a.csv.gz": gzip.compress(CSV, mtime=0)}, NAMED),
    "zip": ({"a.zip": zipped(CSV)}, NAMED),
    "parquet": ({"a.parquet": tables()}, NAMED),
    "movielens": ({"ratings.dat": RATINGS, "movies.dat": MOVIES, "users.dat": USERS}, {}),
    "movielens csv": (
        {
            "ratings.csv": b"userId,movieId,rating,timestamp\n" + RATINGS.replace(b"::", b","),
            "movies.csv": b'movieId,title,genres\n10,"A, The (1999)",Drama\n20,B,Action\n',
        },
        {},
    ),
    "u.data": ({"u.data": RATINGS.replace(b"::", b"\t")}, {}),
    "ncf": (
        {
            "x.train.rating": b"0\t10\t4\t1\n0\t11\t5\t2\n3\t11\t1\t3\n",
            "x.test.rating": b"0\t12\t4\t9\n3\t10\t4\t9\n",
            "x.test.negative": b"(0,12)\t13\t14\n(3,10)\t12\t13\n",
        },
        {},
    ),
    "lightgcn": ({"train.txt": b"0 5 6 7\n1 6\n2 5 9\n", "test.txt": b"0 9\n2 6 7\n"}, {}),
    "criteo": ({"train.txt": b"".join(b"\t".join([b"1", *[b"3"] * 13, *[b"ab"] * 26]) + b"\n" for _ in range(2))}, {}),
}  # fmt: skip


def damaged(blob: bytes, rng: random.Random) -> bytes:
    data = bytearray(blob)
    for _ in range(rng.choice((1, 1, 1, 1, 2, 5))):
        at = rng.randrange(len(data) + 1)
        end = min(len(data), at + rng.randrange(1, 12))
        match rng.randrange(25) % 8:
            case 0:
                data[at:at] = rng.choice(TOKENS)
            case 1:
                data[at:end] = rng.choice(TOKENS)
            case 2:
                del data[at:end]
            case 3:
                data[at:at] = data[at:end]
            case 4 | 6 if data:
                data[at % len(data)] = rng.randrange(256)
            case 7:
                del data[at:]
            case 5:
                start = rng.randrange(len(data) + 1)
                data[at:at] = data[start : start + rng.randrange(40)]
    return bytes(data)


def text_of(blob: bytes) -> str:
    for mark, codec in ((b"\xff\xfe\0\0", "utf-32"), (b"\xff\xfe", "utf-16"), (b"\xfe\xff", "utf-16")):
        if blob.startswith(mark):
            return blob.decode(codec)
    return blob.decode("utf-8-sig", errors="surrogateescape")  # what is no UTF-8 may be in a column that is not read


def rows_of_text(blob: bytes, delimiters: str, quoted: bool, names: list[str] | None, wanted: tuple[str, str]) -> Pairs:
    """Raises ValueError where the text is not one table."""
    first: Exception = ValueError("no column")
    for delimiter in delimiters:
        quoting = csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE
        reader = csv.reader(io.StringIO(text_of(blob), newline=""), delimiter=delimiter, quoting=quoting, strict=True)
        lines = [line for line in reader if line]
        head, rest = (names, lines) if names else (lines[0], lines[1:])
        spaced = names is None and any(name != name.lstrip() for name in head)
        places = [next((k for k, name in enumerate(head) if name.strip() == w), -1) for w in wanted]
        if -1 in places:
            continue
        if any(len(line) != len(head) for line in rest):
            raise ValueError("ragged")
        return [tuple(line[k].strip() if spaced else line[k] for k in places) for line in rest]  # type: ignore[misc]
    raise first


def rows_of_lines(blob: bytes, separator: str) -> Pairs:
    lines = [line for line in re.split("\r\n|\r|\n", text_of(blob)) if line]
    return [(fields[0], fields[1]) for fields in (line.split(separator) for line in lines)]


def rows_of_json(blob: bytes) -> Pairs:
    rows = [json.loads(line) for line in text_of(blob).split("\n") if line.strip()]
    return [(number(row["user_id"]), number(row["item_id"])) for row in rows]


def number(value: Any) -> str:
    return str(int(value)) if isinstance(value, float) and value == int(value) else str(value)


def adjacency(blob: bytes) -> Pairs:
    lines = [line.split() for line in text_of(blob).split("\n") if line.strip()]
    return [(line[0], item) for line in lines for item in line[1:]]


def of_table(blob: bytes) -> Pairs:
    table = pq.read_table(io.BytesIO(blob), columns=["user_id", "item_id"])
    return [(str(u), str(i)) for u, i in zip(table["user_id"].to_pylist(), table["item_id"].to_pylist(), strict=True)]


def of_zip(blob: bytes) -> Pairs:
    with zipfile.ZipFile(io.BytesIO(blob)) as archive:
        names = [name for name in archive.namelist() if name.endswith(".csv")]
        return rows_of_text(archive.read(names[0]), ",;\t|", True, None, ("user_id", "item_id"))


IDS = ("user_id", "item_id")
FIELDS = ["user_id", "item_id", "r", "t", "c"]
READERS: dict[str, Callable[[dict[str, bytes]], Pairs]] = {
    "csv": lambda f: rows_of_text(f["a.csv"], ",;\t|", True, None, IDS),
    "csv without header": lambda f: rows_of_text(f["a.csv"], ",", True, FIELDS, IDS),
    "csv of two files": lambda f: [
        pair for name in sorted(f) for pair in rows_of_text(f[name], ",", True, None, IDS)
    ],
    "csv unquoted": lambda f: rows_of_text(f["a.csv"], ",;\t|", False, None, IDS),
    "tsv": lambda f: rows_of_text(f["a.tsv"], "\t;|,", False, None, IDS),
    "json": lambda f: rows_of_json(f["a.json"]),
    "csv.gz": lambda f: rows_of_text(gzip.decompress(f["a.csv.gz"]), ",;\t|", True, None, IDS),
    "zip": lambda f: of_zip(f["a.zip"]),
    "parquet": lambda f: of_table(f["a.parquet"]),
    "movielens": lambda f: rows_of_lines(f["ratings.dat"], "::"),
    "movielens csv": lambda f: rows_of_text(f["ratings.csv"], ",", True, None, ("userId", "movieId")),
    "u.data": lambda f: rows_of_lines(f["u.data"], "\t"),
    "ncf": lambda f: rows_of_lines(f["x.train.rating"], "\t"),
    "lightgcn": lambda f: adjacency(f["train.txt"]),
}  # fmt: skip


def read_back(out: Path) -> Pairs | None:
    log = open_log(out, pairs=False)
    if not log.schema.user:
        return None
    table = pq.read_table(out / "train")
    sides = []
    for side in ("user", "item"):
        raw = log.vocabulary(side).column("raw").to_pylist()  # type: ignore[arg-type, union-attr]
        sides.append([str(raw[k]) for k in table.column(f"{side}_id").to_pylist()])
    return list(zip(*sides, strict=True))


def attempt(kind: str, files: dict[str, bytes], options: dict[str, Any], work: Path) -> tuple[str, str]:
    """(`refused`, `read` or the kind of finding, details)."""
    shutil.rmtree(work, ignore_errors=True)
    (work / "in").mkdir(parents=True)
    for name, blob in files.items():
        (work / "in" / name).write_bytes(blob)
    given = work / "in" / "a.zip" if kind == "zip" else work / "in"
    try:
        ingest(IngestConfig(input=str(given), **options), work / "out")
    except InputError as error:
        if "\n" in str(error) or not str(error):
            return "message", repr(str(error))
        left = sorted(path.name for path in work.iterdir())
        return ("left behind", str(left)) if left != ["in"] else ("refused", str(error))
    except Exception:
        return "traceback", traceback.format_exc()
    found = read_back(work / "out")
    if kind not in READERS or found is None:
        return "read", ""
    try:
        expected = READERS[kind](files)
    except Exception as error:
        return "read what another reader refuses", f"{type(error).__name__}: {error}; {found}"
    return ("read", "") if found == expected else ("other rows", f"{found}\nexpected {expected}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, default=Path("runs/fuzz-ingest"), help="folder of the findings")
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    artifact._sync = lambda path: None  # a fuzz run need not outlive a power cut
    args.keep.mkdir(parents=True, exist_ok=True)
    rng, outcomes, tried = random.Random(args.seed), Counter[str](), Counter[str]()
    end = time.monotonic() + 60 * args.minutes
    with tempfile.TemporaryDirectory() as folder:
        while time.monotonic() < end:
            kind = rng.choice(list(SEEDS))
            seed_files, options = SEEDS[kind]
            files = dict(seed_files)
            chosen = rng.choice(list(files))
            files[chosen] = damaged(files[chosen], rng)
            options = {
                name: value
                for name, value in options.items()
                if name in ("columns", "quoting", "split_column") or rng.random() < 0.7
            }
            (args.keep / "current").write_text(repr((kind, files, options)))
            outcome, details = attempt(kind, files, options, Path(folder) / "work")
            tried[kind] += 1
            outcomes[outcome] += 1
            if outcome not in ("read", "refused"):
                number_ = sum(outcomes.values())
                (args.keep / f"{outcome.replace(' ', '-')}-{args.seed}-{number_}").write_text(
                    repr((kind, files, options))
                )
                print(f"--- {outcome}: {kind}, {options}\n{files[chosen]!r}\n{details}", flush=True)
    for name, count in sorted(tried.items()):
        print(f"{name}: {count:,} inputs")
    print(f"{sum(tried.values()):,} inputs tried: " + ", ".join(f"{n:,} {name}" for name, n in outcomes.most_common()))
    return int(bool(outcomes.keys() - {"read", "refused"}))


if __name__ == "__main__":
    sys.exit(main())
