"""`recpress export`: a trained model -> programs that run without recpress, and all that serving needs with them."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from recpress.data.dataset import artifact
from recpress.data.dataset.log import SIDES, Log, open_log
from recpress.data.errors import InputError
from recpress.data.sampling.histories import latest_items
from recpress.modules.config import HISTORY
from recpress.modules.frozen.kernel import Storage
from recpress.trainer.artifacts.factors import FACTORS, MODEL, FactorsArtifact, check_vocabulary
from recpress.trainer.config import chosen_schema
from recpress.trainer.export import loader
from recpress.trainer.export.config import ExportConfig
from recpress.trainer.export.index import NEIGHBORS, QUERIES, Library, build, check_library
from recpress.trainer.export.items import read_vectors, write_items
from recpress.trainer.export.labelled import served_program
from recpress.trainer.export.program import Input, Program, golden_ids, write_golden
from recpress.trainer.export.tensors import ProgramTensors
from recpress.trainer.export.towers import SavedTwoTower, served_factors, served_tower
from recpress.trainer.export.triton import write_repository
from recpress.trainer.export.vocabulary import write_hash, write_vocabularies
from recpress.trainer.features.saved import saved_schema
from recpress.trainer.versions import versions

logger = logging.getLogger(__name__)

EXPORT = "export"
"""Kind of the artifact."""
MB = 1e6
UNKNOWN_IDS = {
    "table": "an id that is negative or not below the number of ids: a row of zeros, the smallest log count, and "
    "features of zeros",
    "map": "as above, but the rows of a table with an id map are those of a hash of the id, as in training",
}
"""The rules for ids that a program does not know, for the manifest."""


def export(config: ExportConfig) -> None:
    """Export a model to `config.out`, or check the export `config.check`.

    Raises:
        InputError: the model or its log cannot be used; `out` exists; a golden batch differs.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError("export: started on several ranks; expected one process, which reads the shards of all ranks")
    if config.check:
        check(config.check)
        return
    manifest = artifact.read_manifest(config.model)
    if manifest.get("kind") not in (FACTORS, MODEL):
        raise InputError(
            f"{config.model}: an artifact of kind '{manifest.get('kind')}'; expected a model of `recpress train` or "
            "factors of `recpress factorize`"
        )
    has_items = manifest["kind"] == FACTORS or "two_tower" in manifest["model"]
    library = _library(config, has_items)
    log = _open_log(config, manifest)
    meta: dict[str, Any] = {"model": _describe(config.model, manifest), "log": manifest["log"]}
    inputs = [config.model, *([config.data] if config.data else [])]
    with artifact.writing(config.out, EXPORT, meta, overwrite=config.overwrite, inputs=inputs) as folder:
        programs = _towers(config, manifest, log, folder) if has_items else [_model(config, manifest, log, folder)]
        meta["programs"] = {program.name: program.write(folder, aot=config.aot) for program in programs}
        meta["golden"] = write_golden(folder, programs)
        meta["vocabularies"] = write_vocabularies(log, folder)
        meta["hashed"] = write_hash(log, folder)
        meta["unknown_ids"] = UNKNOWN_IDS
        if has_items:
            meta["score"] = "dot product of a user vector and an item vector; larger is better"
            meta["items"] = write_items(programs[1], log, folder)
        if library is not None:
            meta["index"] = _index(config, library, manifest, programs[0], log, folder)
        if config.triton:
            meta["triton"] = write_repository(folder, meta["programs"])
        meta["versions"] = versions()
        (folder / "load.py").write_bytes(Path(loader.__file__).read_bytes())
    for program in programs:
        error = meta["programs"][program.name]["storage_error"]
        print(f"{config.out}/{program.name}.pt2: {_shown(program)}; largest error from the storage {error:.2g}")
    if "index" in meta:
        print(_shown_index(config.out, meta["index"]))


def check(path: str) -> None:
    """Run the programs of an export on its golden batch, in a process that cannot import recpress.

    Raises:
        InputError: there is no export; a program cannot be run; a result differs.
    """
    manifest = artifact.read_manifest(path, EXPORT)
    folder = artifact.fetch(path, manifest)
    for entry in manifest["contents"]:
        artifact.check_inside(entry["name"], path)
        file = folder / entry["name"]
        if not file.is_file() or artifact.fingerprint(file) != entry["fingerprint"]:
            raise InputError(f"{path}/{entry['name']}: missing or changed since the export")
    hidden = "import runpy, sys; sys.modules.update(dict.fromkeys(('recpress', 'torchrec', 'fbgemm_gpu'))); "
    run = "runpy.run_path(sys.argv[0], run_name='__main__')"
    # This release's own loader: no code of the folder is run, but the programs themselves.
    command = [sys.executable, "-c", f"{hidden}sys.argv.pop(0); {run}", loader.__file__, str(folder)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    print(result.stdout, end="")
    if result.returncode:
        last = result.stderr.strip().splitlines()[-1:] or ["its results differ from the golden batch"]
        raise InputError(f"{path}: {last[0]}")


def _open_log(config: ExportConfig, manifest: dict[str, Any]) -> Log:
    """The log of the model. Raises InputError if it has other ids."""
    path = config.data or manifest["log"]["path"]
    try:
        log = open_log(path, chosen_schema(saved_schema(manifest)), pairs=False)
    except InputError as error:
        hint = "" if config.data else "; --data names the log if it has moved"
        raise InputError(f"{error}{hint}") from error
    check_vocabulary(config.model, manifest, log)
    return log


def _library(config: ExportConfig, has_items: bool) -> Library | None:
    """The library of the index. Raises InputError if it is not installed, or there are no item vectors."""
    if config.index == "none" or (config.index == "auto" and not has_items):
        return None
    if not has_items:
        raise InputError(f"index is '{config.index}': {config.model} has no item vectors; expected none")
    library: Library = "faiss" if config.index == "auto" else config.index
    check_library(library)
    return library


def _model(config: ExportConfig, manifest: dict[str, Any], log: Log, folder: Path) -> Program:
    tensors = ProgramTensors(folder, "model", config.inline_mb * MB)
    return served_program(config.model, manifest, log, tensors, config.storage, config.factory)


def _index(
    config: ExportConfig, library: Library, manifest: dict[str, Any], user: Program, log: Log, folder: Path
) -> dict[str, Any]:
    """Build the index; its entry of the manifest."""
    generator = torch.Generator().manual_seed(0)
    users = torch.randperm(log.num_users, generator=generator)[:QUERIES]
    given = [users]
    if len(user.inputs) > 1:
        length = manifest["model"]["two_tower"]["tables"]["history_length"]
        lists = latest_items(open_log(log.path, log.schema), length).take(users.numpy())
        given += [torch.from_numpy(array.astype(np.int64)) for array in (lists.values, lists.lengths)]
    queries = user.run(*given)
    built = build(library, lambda: read_vectors(folder), log.num_items, queries, config.index_recall, folder)
    return built.describe(len(users), min(NEIGHBORS, log.num_items))


def _shown_index(out: str, entry: dict[str, Any]) -> str:
    (name, value), *_ = [item for item in entry.items() if item[0].startswith("recall@")]
    effort = ", ".join(f"{key} {number}" for key, number in entry["effort"].items())
    how = f"{entry['kind']}{f', {effort}' if effort else ''}"
    return f"{out}/{entry['file']}: {how}; {name} {value:.4f} against exact search, for {entry['queries']} users"


def _towers(config: ExportConfig, manifest: dict[str, Any], log: Log, folder: Path) -> list[Program]:
    """The programs `user` and `item`."""
    storage: Storage = config.storage
    saved = None if manifest["kind"] == FACTORS else SavedTwoTower.open(config.model, manifest, log)
    generator = torch.Generator().manual_seed(0)
    programs = []
    for side in SIDES:
        tensors = ProgramTensors(folder, side, config.inline_mb * MB)
        if saved is None:
            module = served_factors(FactorsArtifact(config.model, manifest), side, tensors, storage)
        else:
            module = served_tower(saved, side, tensors, storage)
        inputs = [Input(side, torch.int64, f"dense ids of {side}s")]
        golden = [golden_ids(log.num_ids(side), generator)]
        if module.history is not None:
            meaning = "dense ids of the items of all users, each user's latest item last"
            inputs += [
                Input(f"{HISTORY}.values", torch.int64, meaning, size=HISTORY),
                Input(f"{HISTORY}.lengths", torch.int64, "number of items of each user", values=HISTORY),
            ]
            lengths = torch.randint(9, (len(golden[0]),), generator=generator)
            golden += [torch.randint(log.num_items, (int(lengths.sum()),), generator=generator), lengths]
        programs.append(Program(side, module, tensors, inputs, golden, f"vectors of {side}s"))
    return programs


def _describe(path: str, manifest: dict[str, Any]) -> dict[str, Any]:
    """Entry of the manifest about the model."""
    files = [(entry["name"], entry["fingerprint"]) for entry in manifest["contents"]]
    found = {
        "path": path,
        "kind": manifest["kind"],
        "name": "factors",
        "fingerprint": hashlib.sha256(json.dumps(files).encode()).hexdigest()[:32],
        "metrics": manifest.get("metrics"),
    }
    if manifest["kind"] == MODEL:
        found["name"] = manifest["model"].get("name", "two-tower")
        found["fallback"] = bool(manifest.get("fallback"))
    return found


def _shown(program: Program) -> str:
    tables = ", ".join(f"{name} {table['storage']}" for name, table in program.tensors.tables.items())
    large = program.tensors.large.names
    files = f", {len(large)} tensors in files" if large else ""
    return f"{program.tensors.nbytes / MB:,.1f} MB ({tables}{files})"
