"""The Python of README.md, docs/ and docstrings runs; the options of the commands that they show exist.

A block of Python that cannot run here has `<!--- skip: next -->` in the line before it.
"""

from __future__ import annotations

import ast
import doctest
import importlib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed as dist
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser, SkipParser
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig
from torchrec.models.dlrm import DLRM

from recpress.modules.hashing.id_map import IdMap
from recpress.trainer.cli import COMMANDS, main

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
SHELL = [*DOCUMENTS, ROOT / "benchmarks" / "README.md"]
WITH_PYTHON = [path for path in DOCUMENTS if "```python" in path.read_text()]
PACKAGES = ("data", "modules", "trainer", "launch")
USERS, ITEMS, ROWS, IDS = 60, 40, 500, 50
MOST_SKIPPED = 0


def document_id(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.fixture
def namespace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """What the documents say that the reader has: a log and maps in the working directory, a DLRM, and its data."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    users, items = rng.integers(0, USERS, ROWS), rng.integers(0, ITEMS, ROWS)
    columns = {
        "user_id": users,
        "item_id": items,
        "label": (users % 2).astype(np.float32),
        "time": np.arange(ROWS),
        "shop": items % 5,
        "tags": [list(range(k % 3)) for k in range(ROWS)],
        "price": rng.random(ROWS),
    }
    vocabulary, factors = tmp_path / "runs" / "log" / "vocabulary", tmp_path / "runs" / "factors"
    vocabulary.mkdir(parents=True)
    factors.mkdir()
    pq.write_table(pa.table(columns), tmp_path / "runs" / "log" / "train.parquet", row_group_size=50)
    for folder, ids in (("runs/maps/user", USERS), ("maps/t_cat_3", IDS), ("maps/t_cat_9", IDS)):
        (tmp_path / folder).mkdir(parents=True)
        rows = torch.from_numpy(rng.integers(0, 10, (ids, 1)).astype(np.int32))
        IdMap(rows=rows, num_rows=10, weights=None, seed=0).save(tmp_path / folder)
    for side, ids in (("user", USERS), ("item", ITEMS)):
        np.save(factors / f"{side}-00000-of-00001.npy", rng.random((ids, 4), dtype=np.float32))
        pq.write_table(
            pa.table({"raw": np.arange(ids) * 7, "count": np.ones(ids, int)}), vocabulary / f"{side}.parquet"
        )
    tables = [
        EmbeddingBagConfig(name=f"t_{name}", embedding_dim=4, num_embeddings=IDS, feature_names=[name])
        for name in ("cat_3", "cat_9")
    ]
    dlrm = DLRM(EmbeddingBagCollection(tables=tables), 3, [8, 4], [8, 1])
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield {
        "num_users": USERS,
        "num_items": ITEMS,
        "user_ids": users,
        "item_ids": items,
        "model": dlrm,
        "dlrm": dlrm,
        "device": torch.device("cpu"),
        "counts": {f"t_{name}": torch.from_numpy(rng.integers(1, 9, IDS)) for name in ("cat_3", "cat_9")},
    }
    dist.destroy_process_group()


@pytest.mark.parametrize("path", WITH_PYTHON, ids=document_id)
def test_python_of_documents(path: Path, namespace: dict[str, Any]) -> None:
    document = Sybil(parsers=[PythonCodeBlockParser(), SkipParser()], path=str(ROOT)).parse(path)
    document.namespace.update(namespace, **OF_DOCUMENT.get(path.name, lambda given: {})(namespace))
    for example in document.examples():
        example.evaluate()


def _of_readme(given: dict[str, Any]) -> dict[str, Any]:
    vectors = given["dlrm"].sparse_arch.embedding_bag_collection.embedding_bags["t_cat_3"].weight
    return {"counts": given["counts"]["t_cat_3"], "vectors": vectors.detach()}


def _of_compress(given: dict[str, Any]) -> dict[str, Any]:
    from torchrec import KeyedJaggedTensor

    tables = [EmbeddingBagConfig(name="t", embedding_dim=4, num_embeddings=10, feature_names=["cat_3"])]
    features = KeyedJaggedTensor.from_lengths_sync(["cat_3"], torch.tensor([3, 40]), torch.tensor([1, 1]))
    Path("rows").mkdir()
    vectors = torch.rand(IDS, 4)
    np.save("rows/t_cat_3.npy", vectors.numpy())
    pq.write_table(pa.table({"vector": list(vectors.numpy())}), "rows/all.parquet")

    def dlrm(device: str, ids: int) -> Any:
        tables = [
            EmbeddingBagConfig(name=f"t_{name}", embedding_dim=4, num_embeddings=ids, feature_names=[name])
            for name in ("cat_3", "cat_9")
        ]
        return DLRM(EmbeddingBagCollection(tables=tables, device=torch.device(device)), 3, [8, 4], [8, 1])

    return {
        "meta_model": dlrm("meta", IDS),
        "other": dlrm("cpu", ITEMS),
        "id_map": IdMap.load("maps/t_cat_3"),
        "collection": EmbeddingBagCollection(tables=tables),
        "features": features,
    }


def _of_tools(given: dict[str, Any]) -> dict[str, Any]:
    return {"rows": torch.rand(IDS, 4)}


def _of_recommend(given: dict[str, Any]) -> dict[str, Any]:
    Path("runs/best/recommendations").mkdir(parents=True)
    columns = {"user": [7], "items": [[14, 0]], "scores": [[0.5, 0.25]]}
    pq.write_table(pa.table(columns), "runs/best/recommendations/part-00000.parquet")
    return {}


def _of_serve(given: dict[str, Any]) -> dict[str, Any]:
    from tests.docs.served import exported

    Path("runs/export").symlink_to(exported() / "export")
    Path("runs/hashed").mkdir()
    Path("runs/hashed/hash_ids.py").write_bytes((ROOT / "trainer" / "export" / "hash_ids.py").read_bytes())
    Path("runs/hashed/manifest.json").write_text('{"hashed": {"user_id": {"kind": "text", "ids": 500}}}')
    return {}


OF_DOCUMENT = {
    "serve.md": _of_serve,
    "README.md": _of_readme,
    "get-started.md": _of_readme,
    "compress.md": _of_compress,
    "recommend.md": _of_recommend,
    "tools.md": _of_tools,
}
"""What single documents say that the reader has."""


def test_few_blocks_are_skipped() -> None:
    assert sum(path.read_text().count("<!--- skip: next") for path in DOCUMENTS) <= MOST_SKIPPED


# ---- docstrings


def with_examples() -> list[str]:
    """Modules with a docstring that shows Python."""
    found = []
    for package in PACKAGES:
        paths = [path for path in sorted((ROOT / package).rglob("*.py")) if ">>>" in path.read_text()]
        found += [".".join(["recpress", *path.relative_to(ROOT).with_suffix("").parts]) for path in paths]
    return found


def test_docstrings_show_examples_as_sessions() -> None:
    """`Example:` is followed by `>>>`, which the next test runs."""
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                    continue
                text = ast.get_docstring(node) or ""
                shown = [line for line in text.splitlines() if line.strip().startswith(("Example:", "Examples:"))]
                assert not shown or ">>>" in text, f"{path}: an example of {getattr(node, 'name', 'the module')}"


def test_examples_of_docstrings(namespace: dict[str, Any]) -> None:
    for name in with_examples():
        module = importlib.import_module(name)
        given = vars(module) | {"np": np, "torch": torch}
        result = doctest.testmod(module, extraglobs=given, optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
        assert result.attempted, name
        assert not result.failed, name


# ---- the command line


def commands(text: str) -> Iterator[list[str]]:
    """Arguments after `recpress` of each command in a document's code blocks, whatever starts it."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    shell = [block for language, block in blocks if language in ("", "sh", "bash")]
    indented = re.findall(r"^ {4}\S.*\n", text, flags=re.MULTILINE)
    joined = "\n".join([*shell, *indented]).replace("\\\n", " ")
    for line in joined.splitlines():
        try:
            words = shlex.split(line.strip(), comments=True)
        except ValueError:  # output of a command
            continue
        words = [word for word in words if word not in ("...", "…")]
        if "recpress.trainer.cli" in words and "-m" in words:
            yield words[words.index("recpress.trainer.cli") + 1 :]
        elif words[:1] == ["recpress"] and len(words) > 1:
            yield words[1:]
        elif "--" in words and (stage := _stage(words)):
            passed = words[words.index("--") + 1 :]
            yield passed if stage == "run" else [stage, *passed]


def _stage(words: list[str]) -> str | None:
    """Of `torchx run … launch/components.py:STAGE` and `… recpress.STAGE`."""
    for word in words:
        for start in ("launch/components.py:", "recpress."):
            if word.startswith(start) and word.removeprefix(start) in ("run", *COMMANDS):
                return word.removeprefix(start)
    return None


def _can_run(arguments: list[str]) -> bool:
    """Whether these are a command's, and not a word of prose that follows `recpress`."""
    return arguments[0] in COMMANDS or " ".join(arguments[:2]) in COMMANDS


SHOWN = [
    pytest.param(arguments, id=f"{path.name}-{number}-{arguments[0]}")
    for path in SHELL
    for number, arguments in enumerate(commands(path.read_text()))
]


@pytest.mark.parametrize("path", [path for path in DOCUMENTS if "```toml" in path.read_text()], ids=document_id)
def test_options_of_files_exist(path: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for block in re.findall(r"^```toml\n(.*?)^```", path.read_text(), flags=re.MULTILINE | re.DOTALL):
        command = re.match(r"# ([\w-]+)\.toml(?:, with (.*))?", block)
        assert command, f"{path}: a block of TOML; expected '# COMMAND.toml' in its first line"
        (tmp_path / "options.toml").write_text(block)
        given = [*command[2].split(), "--data", "LOG", "--out", "OUT"] if command[2] else []
        arguments = [*command[1].split("-"), *given, "--config", str(tmp_path / "options.toml")]
        assert main(["check", *arguments]) == 0, capfd.readouterr().err


def test_commands_are_found() -> None:
    assert len(SHOWN) > 30
    assert {arguments[0] for arguments in (param.values[0] for param in SHOWN)} >= {
        "train",
        "factorize",
        "hash",
        "sample",
    }


@pytest.mark.parametrize("arguments", SHOWN)
def test_options_of_commands_exist(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert _can_run(arguments), f"no such command: {' '.join(arguments)}"
    if "--config" in arguments and not (ROOT / arguments[arguments.index("--config") + 1]).exists():
        if arguments[0] == "pipeline":
            return
        place = arguments.index("--config")  # a file that the reader writes, with what else is needed
        arguments = [*arguments[:place], *arguments[place + 2 :], "--data", "LOG", "--out", "OUT"]
    monkeypatch.chdir(ROOT)  # for the recipes
    try:
        status = main(["check", *arguments])
    except SystemExit as stopped:  # of --help
        status = int(stopped.code or 0)
    assert status == 0, capfd.readouterr().err
