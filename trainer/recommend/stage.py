"""`recpress recommend`: a model or factors, and users -> the best items of each, as Parquet parts with raw ids.

Each rank holds the vectors of some items and writes every world-th part. In a round, every rank takes a block of its
users at a time; all ranks find the best of their items for the blocks of all ranks, and send them to the rank that
writes. So no rank holds more than its share of the item vectors, and all ranks are busy until the last part.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import torch.distributed as dist
from torch import Tensor

from recpress.data.dataset import artifact
from recpress.data.dataset.log import SIDES, Log
from recpress.data.errors import InputError
from recpress.data.ingest.raw_files import RawFile
from recpress.trainer.artifacts.factors import FACTORS, check_vocabulary, claimed, describe_log, fingerprints_of
from recpress.trainer.config import chosen_schema
from recpress.trainer.distributed.collectives import (
    all_gather,
    all_gather_arrays,
    all_reduce,
    communication_device,
)
from recpress.trainer.distributed.heartbeat import activity
from recpress.trainer.distributed.process_group import Ranks, process_group
from recpress.trainer.distributed.rank_errors import raise_on_all_ranks
from recpress.trainer.errors import same_command_resumes
from recpress.trainer.evaluate.heldout import CHUNK, SEEN, ceil_div
from recpress.trainer.evaluate.ranking import ITEM_CHUNK, check_users
from recpress.trainer.evaluate.stage import check_that_it_ranks, kind_of, load_vectors
from recpress.trainer.model.vectors import VectorFn
from recpress.trainer.observability.progress import Progress
from recpress.trainer.open_log import open_on_all_ranks
from recpress.trainer.recommend.config import RecommendConfig
from recpress.trainer.recommend.index import ExportIndex
from recpress.trainer.recommend.parts import UNKNOWN, Output, Share
from recpress.trainer.recommend.seen import SeenItems
from recpress.trainer.recommend.top_items import ItemsByNorm, TopItems
from recpress.trainer.recommend.users import Users, all_users, files_of_users, users_of_files
from recpress.trainer.report.numbers import format_bytes, format_seconds

logger = logging.getLogger(__name__)

Best = Callable[[Tensor, np.ndarray, np.ndarray], tuple[Tensor, Tensor]]
_OTHER_BYTES = 96 << 20
"""Memory of threads, allocators and libraries that `_memory` does not count."""


def recommend(config: RecommendConfig) -> dict[str, Any]:
    """Write the recommendations to `config.out`, and return what the manifest says of them. Collective.

    Raises:
        InputError: the model, the log or the users cannot be used; `out` exists. On every rank.
    """
    with process_group(config.device) as ranks, same_command_resumes():
        return _recommend(config, ranks)


def _recommend(config: RecommendConfig, ranks: Ranks) -> dict[str, Any]:
    """`recommend` within its process group, which must outlive the model: see `process_group`."""
    began = time.monotonic()
    manifest: dict[str, Any] = {}
    kind = path = ""
    files: list[RawFile] | None = None
    with raise_on_all_ranks():
        check_that_it_ranks(config.model)
        kind, manifest = kind_of(config.model), artifact.read_manifest(config.model)
        files = None if config.data is None else files_of_users(config.data, config.schema.item)
        path = _log_path(config, manifest, files)
    log = open_on_all_ranks(path, chosen_schema(config.schema), skip=False)
    users, items, index = None, None, None
    with raise_on_all_ranks():
        for side in SIDES:
            if log.hash_fingerprint(log.column(side)) is not None:
                raise InputError(
                    f"{path}: its {side}s are hashed while they are read, so raw ids are not known; expected "
                    "a log that `recpress ingest` numbered"
                )
        _check(config, manifest, log)
        index = ExportIndex(config.index, manifest) if config.index is not None else None
        items = _raw_items(log)
        users = _users(config, files, log)
    assert users is not None
    assert items is not None
    inputs = [given for given in (config.model, config.data, path, config.index) if given]
    with claimed(config.out):
        run: dict[str, Any] = {}
        with raise_on_all_ranks(), activity("taking fingerprints"):
            if ranks.rank == 0:
                run = _run(config, manifest, log, users)
        sizes = [min(config.users_per_part, len(users) - k) for k in range(0, len(users), config.users_per_part)]
        output = Output(config.out, run, sizes)
        remain = output.open(overwrite=config.overwrite, inputs=inputs)
        done = len(users) - int(np.sum(np.array(sizes)[remain]))
        if ranks.rank == 0 and done:
            logger.info("resuming: %s of %s parts are complete", f"{len(sizes) - len(remain):,}", f"{len(sizes):,}")
        if len(remain):
            share = Share(remain, config.users_per_part, len(users), ranks.rank, ranks.world_size)
            _write_parts(config, kind, log, users, items, index, share, output, ranks, done)
        measured = output.measured
        facts = users.facts | {"written": len(users)} | output.short_lists()
        meta: dict[str, Any] = {}
        with raise_on_all_ranks():
            if ranks.rank == 0:
                if users.unknown is not None and len(users.unknown):
                    output.write(UNKNOWN, pa.table({"user": users.unknown}))
                meta = {
                    "log": describe_log(log),
                    "model": {"path": config.model, "kind": kind, "fingerprint": run["model"]},
                    "config": asdict(config),
                    "users": facts,
                    "parts": len(sizes),
                    **measured,
                }
        output.finish(meta, overwrite=config.overwrite)
    if ranks.rank == 0:
        how = f"; recall {measured['index']['recall']:.4f} against exact search" if "index" in measured else ""
        unknown = f"; users that are not in the log: {facts['unknown']:,} ({UNKNOWN})" if facts.get("unknown") else ""
        short = f"; users with fewer items: {facts['short']:,}" if facts["short"] else ""
        short += f" ({facts['empty']:,} with none)" if facts["empty"] else ""
        took = format_seconds(time.monotonic() - began)
        print(f"{config.out}: up to {config.k:,} items per user, users: {len(users):,}, {took}{short}{how}{unknown}")
    return {"users": facts, "parts": len(sizes), **measured}


def _log_path(config: RecommendConfig, manifest: dict[str, Any], files: list[RawFile] | None) -> str:
    """Path of the log with the vocabularies and the seen items."""
    if config.log is not None:
        return config.log
    if config.data is not None and files is None:
        return config.data
    path = str(manifest["log"]["path"])
    if not artifact.is_remote(path) and not artifact.exists(*artifact.resolve(path)):
        raise InputError(f"{path}: no such log, on which {config.model} was trained; name its folder with --log")
    return path


def _check(config: RecommendConfig, manifest: dict[str, Any], log: Log) -> None:
    check_vocabulary(config.model, manifest, log)
    if config.k > log.num_items:
        raise InputError(f"k is {config.k:,}, expected at most {log.num_items:,}, the number of items of {log.path}")
    if config.exclude_seen and log.is_part:
        assert log.sample_of is not None
        raise InputError(
            f"{log.path}: a sample of {log.sample_of['log']}, so not all items that a user has seen could be omitted; "
            "expected that log (ids are the same): --log"
        )


def _users(config: RecommendConfig, files: list[RawFile] | None, log: Log) -> Users:
    if config.data is None or files is None:
        return all_users(log)
    return users_of_files(config.data, files, log, skip=config.on_unknown == "skip")


def _raw_items(log: Log) -> pa.Array:
    """Raw id of each item; the dense ids if the log has no others."""
    table = log.vocabulary("item")
    if table is None:
        return pa.array(np.arange(log.num_items))
    return table.column("raw").combine_chunks()


def _run(config: RecommendConfig, manifest: dict[str, Any], log: Log, users: Users) -> dict[str, Any]:
    """Settings and inputs that decide what the parts hold."""
    used: list[Any] = [log.vocabulary_fingerprint("user"), log.vocabulary_fingerprint("item")]
    if config.exclude_seen:
        used += [fingerprints_of(rows.describe_files()) for part in SEEN if (rows := getattr(log, part)) is not None]
    model = manifest.get("model", {})
    for side in ("user", "item"):
        if model.get(f"{side}_features"):
            used.append(artifact.fingerprint(f"{log.root}/{side}s.parquet", log.filesystem))
    return {
        "k": config.k,
        "exclude_seen": config.exclude_seen,
        "users_per_part": config.users_per_part,
        "model": _digest(manifest),
        "log": _digest(used),
        "users": users.fingerprint,
        "index": None if config.index is None else _digest(artifact.read_manifest(config.index)),
    }


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]


def _write_parts(
    config: RecommendConfig,
    kind: str,
    log: Log,
    users: Users,
    items: pa.Array,
    index: ExportIndex | None,
    share: Share,
    output: Output,
    ranks: Ranks,
    done: int,
) -> None:
    """Write the parts that remain, and what is measured: the `memory` that was stated, in bytes, and the recall of the
    `index`. Collective."""
    seen = SeenItems(log, users, share) if config.exclude_seen else None
    if seen is not None:
        with activity("counting seen items"):
            seen.count()
    user, item = load_vectors(config.model, kind, log, ranks)
    measured: dict[str, Any] = {
        "memory": _state_memory(config, kind, log, users, items, index, share, seen, item, ranks),
    }
    with raise_on_all_ranks():
        if index is not None:
            index.open()
    if seen is not None:
        with activity("reading seen items"):
            seen.read()
    blocks = _Blocks(user, item, log.num_items, config.k, ranks)
    with Progress("recommending", "user", total=len(users), show=ranks.rank == 0) as progress:
        progress.start_at(done)
        for round in range(share.rounds):
            start, size = share.start(round), share.size(round)
            best = np.empty((size, config.k), np.float32), np.empty((size, config.k), np.int32)
            sizes = share.sizes(round)
            for first in range(0, sizes[0], CHUNK):
                last = min(first + CHUNK, size)
                ids = users.dense_ids(start + first, start + last) if first < size else np.empty(0, np.int64)
                slot = round * config.users_per_part + first
                lists = seen.of(slot, slot + len(ids)) if seen is not None else None
                scores, found = blocks.top(ids, lists, index)
                if index is not None and round == first == 0:
                    recall, asked = blocks.recall(found, ids, lists)
                    measured["index"] = {
                        "path": config.index,
                        "library": index.library,
                        "recall": recall,
                        "users": asked,
                    }
                best[0][first:last], best[1][first:last] = scores.numpy(), found.numpy()
            if round == 0:
                output.begin(measured)
            with raise_on_all_ranks():
                part = share.part(round)
                if part is not None:
                    output.write_part(part, _table(users.raw(start, start + size), items, *best), config.k)
            progress.update(sum(sizes))


def _state_memory(
    config: RecommendConfig,
    kind: str,
    log: Log,
    users: Users,
    items: pa.Array,
    index: ExportIndex | None,
    share: Share,
    seen: SeenItems | None,
    item: VectorFn,
    ranks: Ranks,
) -> int:
    """Log the peak memory of the parts, in bytes above the loaded model, of the rank with the largest. Collective."""
    ids = torch.arange(ITEM_CHUNK, device=ranks.device).clamp_(max=log.num_items - 1)
    with torch.no_grad():
        dim = item(ids).shape[1]
    shard = ceil_div(ceil_div(log.num_items, ITEM_CHUNK), ranks.world_size) * ITEM_CHUNK
    per_part = min(share.users_per_part, len(users)) * config.k
    width = items.nbytes / len(items) + 8
    mapped = 4 * dim * (min(shard, log.num_items) + min(share.slots, len(users))) if kind == FACTORS else 0
    pieces = {
        "item vectors": ItemsByNorm.nbytes(shard, dim),
        "mapped factors": mapped,
        "seen items": seen.nbytes if seen is not None else 0,
        "index": index.nbytes if index is not None else 0,
        "raw ids": items.nbytes + users.nbytes,
        "scores": TopItems.nbytes(config.k, dim, shard, ranks.device)
        + 3 * ranks.world_size * CHUNK * (4 * dim + 12 * config.k),
        "a part": int(per_part * (8 + 2 * (width + 12))),
        "other": _OTHER_BYTES,
    }
    total = int(all_reduce(torch.tensor([sum(pieces.values())]), dist.ReduceOp.MAX))
    if ranks.rank == 0:
        each = ", ".join(f"{name} {format_bytes(size)}" for name, size in pieces.items() if size)
        logger.info("peak memory per rank, above the loaded model: at most %s (%s)", format_bytes(total), each)
    return total


class _Blocks:
    """The best items of a block of at most CHUNK users of each rank."""

    def __init__(self, user: VectorFn, item: VectorFn, num_items: int, k: int, ranks: Ranks) -> None:
        self.user, self.k, self.ranks = user, k, ranks
        with activity("computing item vectors"):
            self.items = ItemsByNorm(item, num_items, ITEM_CHUNK, ranks.device)
        self.top_items = TopItems(self.items, k)

    @torch.no_grad()
    def top(
        self, ids: np.ndarray, seen: Sequence[np.ndarray] | None, index: ExportIndex | None = None
    ) -> tuple[Tensor, Tensor]:
        """(scores (n, k) float32, item ids), best first, on the CPU. Places without an item have -inf. Collective.

        Args:
            ids: users of this rank, (n,), n at most CHUNK.
            seen: (number of seen items of each, these items).
            index: proposes the items; by default all are considered.
        """
        nothing: list[np.ndarray] = [np.zeros(len(ids), np.int64), np.empty(0, np.int32)]
        lists = nothing if seen is None else [*seen]
        vectors = self._user_vectors(ids)
        if index is not None:
            lists = index.search(vectors[: len(ids)], lists[0], lists[1], self.k)
        best = self.top_items if index is None else self.top_items.among
        everyone = zip(all_gather(vectors), all_gather_arrays([ids, *lists]), strict=True)
        tops = [self._of_shard(best, of_rank, *arrays) for of_rank, arrays in everyone]
        if len(tops) == 1:
            scores, items = tops[0]
        else:
            scores, items = (self._exchanged(torch.stack(parts)) for parts in zip(*tops, strict=True))
            scores, order = scores.sort(
                dim=1, descending=True, stable=True
            )  # the lists are by rank, so by rising item id
            scores, items = scores[:, : self.k], items.gather(1, order[:, : self.k])
        return scores[: len(ids)].cpu(), items[: len(ids)].cpu()

    def recall(self, found: Tensor, ids: np.ndarray, seen: Sequence[np.ndarray] | None) -> tuple[float, int]:
        """(share of the items of the exact lists that are in `found` (n, k), users of all ranks). Collective."""
        scores, exact = self.top(ids, seen)
        present = scores > -torch.inf
        hits = torch.zeros_like(present)
        for row in range(len(ids)):
            hits[row] = torch.isin(exact[row], found[row]) & present[row]
        sums = all_reduce(torch.tensor([int(hits.sum()), int(present.sum()), len(ids)])).tolist()
        return sums[0] / sums[1] if sums[1] else 1.0, sums[2]

    def _user_vectors(self, ids: np.ndarray) -> Tensor:
        """(CHUNK, D) float32; rows beyond the users are zero. Every call has the same shape, as in `evaluate`."""
        padded = torch.zeros(CHUNK, dtype=torch.int64)
        padded[: len(ids)] = torch.from_numpy(ids)
        vectors = self.user(padded.to(self.ranks.device)).detach().to(self.ranks.device, torch.float32).clone()
        if vectors.shape != (CHUNK, self.items.dim):
            raise ValueError(f"user vectors {tuple(vectors.shape)}; expected ({CHUNK}, {self.items.dim}) as for items")
        vectors[len(ids) :] = 0
        return vectors

    def _of_shard(
        self, best: Best, vectors: Tensor, ids: np.ndarray, lengths: np.ndarray, items: np.ndarray
    ) -> list[Tensor]:
        """[scores, item ids], (CHUNK, k) each, of the items of this rank."""
        scores = vectors.new_full((CHUNK, self.k), -torch.inf)
        found = torch.zeros(CHUNK, self.k, dtype=torch.int64, device=vectors.device)
        if len(ids):
            check_users(vectors, ids, self.items.largest_norm)
            scores[: len(ids)], found[: len(ids)] = best(vectors[: len(ids)], lengths, items)
        return [scores, found]

    def _exchanged(self, lists: Tensor) -> Tensor:
        """(world, CHUNK, k), a list for each rank -> (CHUNK, world * k), the lists of all ranks for this rank."""
        sent = lists.to(communication_device()).contiguous()
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent)
        return received.permute(1, 0, 2).reshape(CHUNK, -1)


def _table(raw: pa.Array, items: pa.Array, scores: np.ndarray, found: np.ndarray) -> pa.Table:
    """Columns `user`, `items` and `scores`, a row per user."""
    present = scores > -np.inf
    offsets = pa.array(np.concatenate([[0], np.cumsum(present.sum(1))]).astype(np.int32))
    return pa.table(
        {
            "user": raw,
            "items": pa.ListArray.from_arrays(offsets, items.take(pa.array(found[present]))),
            "scores": pa.ListArray.from_arrays(offsets, pa.array(scores[present])),
        }
    )
