"""Starts a new run from the weights of an earlier one: dense parameters by name, embedding rows by id.

A run that resumes from a checkpoint has the weights of the checkpoint instead. Frozen tables get their rows from this
run's factors; optimizer states start anew.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from recpress.data.dataset.log import Log
from recpress.data.errors import InputError
from recpress.modules.als.factors import RowBlocks
from recpress.modules.hashing.id_map import IdMap
from recpress.modules.row_source import BLOCK_BYTES, RowSource
from recpress.trainer.config import RunConfig
from recpress.trainer.distributed.collectives import all_reduce, rank_and_world
from recpress.trainer.distributed.rank_errors import raise_on_all_ranks
from recpress.trainer.features.config import FeatureConfig
from recpress.trainer.features.id_space import IdSpace, Match, match_ids, read_space, same_rows
from recpress.trainer.features.numbers import Numbers
from recpress.trainer.loop import run_state
from recpress.trainer.model.earlier import SavedTable, SavedWeights, open_saved, read_description
from recpress.trainer.model.weights import Rectangle, dense_part, trainable_shards

logger = logging.getLogger(__name__)

OPTION = "--warm-start-names"
_RIDGE = 1e-6
"""Relative to the mean squared length of a factor."""
_SHOWN = 8
"""Most names in a line of the log."""


@dataclass(frozen=True)
class NewTable:
    """An embedding table of this run."""

    space: IdSpace
    id_map: IdMap | None = None
    factors: RowSource | None = None
    """Vectors of all ids that the table started from, (ids, d): those of new ids are mapped into the earlier space."""


@dataclass(frozen=True)
class _TablePlan:
    saved: SavedTable
    match: Match
    """Of rows."""
    num_rows: int
    factors: RowSource | None


@dataclass
class _Plan:
    """What is loaded from where."""

    dense: dict[str, torch.Tensor] = field(default_factory=dict)
    tables: dict[str, _TablePlan] = field(default_factory=dict)
    """By name in `state_dict`."""
    missing: list[str] = field(default_factory=list)
    """What starts at its init: names, and why."""


def describe_spaces(log: Log, spaces: Mapping[str, IdSpace]) -> dict[str, Any]:
    """Entry of a manifest, from which a later run can start."""
    return {"log": log.path, "tables": {name: asdict(space) for name, space in spaces.items()}}


def earlier_numbers(config: RunConfig) -> Callable[[str, FeatureConfig], Numbers | None]:
    """(feature, its configuration) -> the transform or buckets of the earlier model; None if it has none, or others.

    A network that starts from earlier weights needs its inputs as they were, not standardized by other statistics.

    Raises:
        InputError: there is no earlier model.
    """
    if config.warm_start is None:
        return lambda name, feature: None
    described = read_description(config.warm_start).get("model") or {}
    numbers, known = described.get("numbers", {}), described.get("features", {})
    names = config.warm_start_pairs

    def find(name: str, feature: FeatureConfig) -> Numbers | None:
        old = names.get(name, name)
        if old not in numbers or old not in known:
            return None
        settings = ("kind", "transform", "missing", "buckets", "boundaries")
        now = asdict(feature)
        if any(_plain(now[option]) != _plain(known[old].get(option)) for option in settings):
            return None
        return Numbers.of(numbers[old])

    return find


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def warm_start(
    config: RunConfig,
    model: nn.Module,
    log: Log,
    tables: Mapping[str, NewTable],
    features: Sequence[str] = (),
    floats: Sequence[str] = (),
) -> None:
    """Fill the model (sharded, with tables that are initialized) from `config.warm_start`. Collective.

    Each rank reads the rows of its shards only, in bounded blocks. Rows of new ids are the mean of the loaded rows, or
    their factors, mapped linearly into the space of the loaded rows (least squares over the ids that both have).

    Args:
        tables: name of each embedding table of this run -> what its rows are of.
        features: keys of the batches, in their order.
        floats: columns of the dense features, in their order.

    Raises:
        InputError: no such model; shapes, maps, frozen rows or ids do not fit; a name of `--warm-start-names` is
            unknown. On every rank.
    """
    assert config.warm_start is not None
    plan, saved = _Plan(), None
    with raise_on_all_ranks():
        saved = open_saved(config.warm_start)
        plan = _Planner(config, saved, model, log, tables).plan(features, floats)
        for name, tensor in dense_part(model):
            if name in plan.dense:
                with torch.no_grad():
                    tensor.copy_(plan.dense[name])
    complete: list[str] = []
    grown: list[str] = []
    for name, parts in trainable_shards(model):
        if name in plan.tables:
            added = _load_table(parts, plan.tables[name])
            (grown if added else complete).append(f"{_short(name)}: {added}" if added else _short(name))
    if rank_and_world()[0] == 0:
        lines = [f"{len(plan.dense)} dense tensors"]
        lines += [f"all rows of {len(complete)} tables ({_listed(complete)})"] if complete else []
        logger.info(f"warm start from {config.warm_start}: {'; '.join(lines + grown)}")
        if plan.missing:
            logger.warning(f"not from {config.warm_start}: {'; '.join(plan.missing)}")


class _Planner:
    """Decides what is loaded from where. The same on every rank; reads no rows."""

    def __init__(
        self, config: RunConfig, saved: SavedWeights, model: nn.Module, log: Log, tables: Mapping[str, NewTable]
    ) -> None:
        self.saved, self.log, self.tables, self.names = saved, log, tables, config.warm_start_pairs
        described = saved.manifest.get("ids")
        if not isinstance(described, dict) or "tables" not in described:
            raise InputError(
                f"{saved.path}: its manifest does not say what the rows of its tables are of; expected a model or a "
                "checkpoint of this release"
            )
        self.old_log = str(described["log"])
        self.spaces = {name: read_space(space, saved.path) for name, space in described["tables"].items()}
        trained = {name.removeprefix("model/") for name in run_state.weights(model)}
        parts = {name: tuple(tensor.shape) for name, tensor in dense_part(model)}
        self.dense = {name: shape for name, shape in parts.items() if name in trained}
        self.of_inputs = parts.keys() - trained
        """Buffers with what the inputs of this run say, such as counts of ids."""
        self.shards = {name: _size(model, name) for name, _ in trainable_shards(model)}
        self.result = _Plan()
        self.used: set[str] = set()
        """Earlier names that are loaded."""

    def plan(self, features: Sequence[str], floats: Sequence[str]) -> _Plan:
        """Raises InputError if something does not fit."""
        self._check_names()
        self._check_frozen()
        self._check_order(features, floats)
        for name, size in self.shards.items():
            self._table(name, size)
        for name, shape in self.dense.items():
            self._dense(name, shape)
        if not self.result.dense and not self.result.tables:
            raise InputError(
                f"{self.saved.path}: nothing in it fits this model; it has "
                f"{_listed([*self.saved.dense, *self.spaces])}, expected {_listed([*self.dense, *self.tables])}; "
                f"{OPTION} NEW=OLD names what belongs together"
            )
        unused = [n for n in self.saved.dense if n not in self.used | self.of_inputs]
        unused += [name for name in self.saved.tables if name not in self.used]
        if unused:
            self.result.missing.append(f"the earlier model's {_listed(unused)} are not used")
        return self.result

    def _check_names(self) -> None:
        """Each name of --warm-start-names is one of this model, or the start of one before a dot."""
        now = {*self.dense, *self.shards, *self.tables}
        then = {*self.saved.dense, *self.saved.tables, *self.spaces}
        for new, old in self.names.items():
            for name, known, whose in ((new, now, "this model"), (old, then, "the earlier model")):
                if name and name not in known and not any(other.startswith(f"{name}.") for other in known):
                    near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
                    raise InputError(
                        f"{OPTION} {new}={old}: {whose} has no '{name}'" + (f"; nearest: {near[0]}" if near else "")
                    )

    def _old(self, name: str) -> str | None:
        """The earlier name of a dense tensor or a table; None if the user omits it."""
        parts = name.split(".")
        for end in range(len(parts), 0, -1):
            start = ".".join(parts[:end])
            if start in self.names:
                old = self.names[start]
                return ".".join([old, *parts[end:]]) if old else None
        return name

    def _check_frozen(self) -> None:
        """The dense part was trained on the earlier frozen rows, so these must be the same."""
        for table, new in self.tables.items():
            name = self._old(table)
            old = self.spaces.get(name) if name else None
            if old is None or new.space.factors == old.factors:
                continue
            then, now = (_rows_are(space) for space in (old, new.space))
            if new.space.factors and old.factors:
                raise InputError(
                    f"table '{table}': the earlier model was trained on other frozen rows ({then}, now {now}), and its "
                    "network fits those only; expected the same factors, a run without --warm-start, or "
                    f"{OPTION} {table}= to accept it"
                )
            self.result.missing.append(f"table '{table}' ({then} then, {now} now)")

    def _check_order(self, features: Sequence[str], floats: Sequence[str]) -> None:
        """Raise InputError if the features that both have are in another order: shapes would fit, columns not."""
        described = (self.saved.manifest.get("model") or {}).get("features", {})
        kinds = {name: entry.get("kind") == "float" for name, entry in described.items()}
        for now, of_float in ((features, False), (floats, True)):
            then = [name for name, is_float in kinds.items() if is_float == of_float]
            mapped = [self.names.get(name, name) for name in now]
            both = list(dict.fromkeys(name for name in mapped if name in then))
            if (wanted := [name for name in then if name in both]) != both:
                raise InputError(
                    f"features: {', '.join(both)} are in another order than in {self.saved.path}, whose network reads "
                    f"them as {', '.join(wanted)}; expected that order"
                )

    def _dense(self, name: str, shape: tuple[int, ...]) -> None:
        old = self._old(name)
        if old is None:
            self.result.missing.append(f"'{name}' (omitted)")
            return
        if old not in self.saved.dense:
            self.result.missing.append(f"'{name}' (new)")
            return
        found = self.saved.dense[old]
        self.used.add(old)
        if tuple(found.shape) != shape:
            raise InputError(
                f"'{name}' has shape {shape}, but {'it' if name == old else repr(old)} in {self.saved.path} has "
                f"{tuple(found.shape)}; expected the same network and features, or {OPTION} {name}= to omit it"
            )
        self.result.dense[name] = found

    def _table(self, name: str, shape: tuple[int, int]) -> None:
        table = _short(name)
        before = self._old(name) if name in self.names else self._old(table)
        if before is None:
            self.result.missing.append(f"table '{table}' (omitted)")
            return
        found = self._find_table(name, before)
        if found is None:
            old = self.spaces.get(_short(before))
            if old is not None and old.factors is None:
                raise InputError(
                    f"table '{table}': {self.saved.path} has no rows of '{_short(before)}', which its manifest "
                    "describes; the weights are damaged"
                )
            if not any(f"table '{table}'" in line for line in self.result.missing):
                self.result.missing.append(f"table '{table}' (new)")
            return
        self.used.add(found.name)
        rows, dim = found.shape
        found.check()
        if dim != shape[1]:
            raise InputError(
                f"table '{table}' has shape {shape}, but {(rows, dim)} in {self.saved.path}; expected dimension {dim}, "
                f"or {OPTION} {table}= to omit it"
            )
        new, old = self.tables[table], self.spaces.get(_short(found.name))
        if old is None:
            raise InputError(f"{self.saved.path}: its manifest does not describe the table '{_short(found.name)}'")
        if old.map is None and rows < old.num_ids:  # without its last shard a table is only shorter
            raise InputError(
                f"{found.name}: {rows} rows in {self.saved.path}, whose manifest has {old.num_ids} ids; the last "
                "shards of the table are missing, so that the weights are damaged"
            )
        match = match_ids(new.space, self.log, old, self.old_log, table)
        if new.space.map is None and old.map is None:
            self.result.tables[name] = _TablePlan(found, match, shape[0], new.factors)
        else:
            self._check_maps(table, new, old, match)
            if shape[0] < rows:
                raise InputError(
                    f"table '{table}' has shape {shape}, but {(rows, dim)} in {self.saved.path}; expected at "
                    f"least {rows} rows, or {OPTION} {table}= to omit it"
                )
            self.result.tables[name] = _TablePlan(found, Match(None, rows), shape[0], None)

    def _find_table(self, name: str, before: str) -> SavedTable | None:
        """By the name in `state_dict`, or by that of the table alone."""
        if before in self.saved.tables:
            return self.saved.tables[before]
        path = name.removesuffix(f".{_short(name)}.weight")
        if (exact := f"{path}.{before}.weight") in self.saved.tables:
            return self.saved.tables[exact]
        named = [table for full, table in self.saved.tables.items() if _short(full) == before]
        if len(named) > 1:
            raise InputError(
                f"table '{_short(name)}': {self.saved.path} has {', '.join(table.name for table in named)}; expected "
                f"one of them in {OPTION} {name}=OLD"
            )
        return named[0] if named else None

    def _check_maps(self, table: str, new: NewTable, old: IdSpace, match: Match) -> None:
        """Raise InputError unless the ids that both have share rows as before."""
        now, then = new.space.map, old.map
        same_ids = match.old is None and match.shared == new.space.num_ids == old.num_ids
        if now == then and same_ids:
            return
        before = self.saved.id_map(old.map_name) if old.map_name else None
        if new.id_map is not None and before is not None and same_rows(match, new.id_map, before):
            return
        raise InputError(
            f"table '{table}': its ids share rows by another map (fingerprint {now}) than in {self.saved.path} "
            f"({then}), so that a row means other ids; expected the same map, one that `recpress hash --extend` "
            f"made from it, or {OPTION} {table}= to omit it"
        )


def _load_table(parts: list[tuple[Rectangle, torch.Tensor]], plan: _TablePlan) -> str:
    """Fill this rank's shards of a table; how its new rows start, in words, "" if there are none. Collective."""
    saved, match, dim = plan.saved, plan.match, plan.saved.shape[1]
    total, count = torch.zeros(dim, dtype=torch.float64), torch.zeros(dim, dtype=torch.float64)
    added = plan.num_rows - match.shared
    fold = _fold_in(saved, match, plan.factors) if added and plan.factors is not None else None
    with raise_on_all_ranks():
        for (row_range, columns), part in parts:
            for first, last in _steps(row_range, columns):
                old = match.of(first, last)
                known = np.flatnonzero(old >= 0)
                read = saved.rows(old[known], columns)
                _write(part, first - row_range[0], known, read)
                total[slice(*columns)] += read.double().sum(0)
                count[slice(*columns)] += len(known)
    if not added:
        return ""
    mean = (all_reduce(total) / all_reduce(count).clamp_min(1)).float()
    with raise_on_all_ranks():
        for (row_range, columns), part in parts:
            for first, last in _steps(row_range, columns):
                fresh = np.flatnonzero(match.of(first, last) < 0)
                if not len(fresh):
                    continue
                values = mean[slice(*columns)].expand(len(fresh), -1)
                if fold is not None and plan.factors is not None:
                    values = _read_factors(plan.factors, first, last)[fresh] @ fold[:, slice(*columns)]
                _write(part, first - row_range[0], fresh, values)
    how = "the mean of these" if fold is None else "their factors, mapped to the space of these"
    return f"{match.shared:,} rows, and {added:,} new rows as {how}"


def _fold_in(saved: SavedTable, match: Match, factors: RowSource) -> torch.Tensor | None:
    """The linear map (d, dim) of factors to earlier rows with the least squared error over the ids that both have; None
    if they are too few. Collective: each rank sums over its share of the ids."""
    dim, width = saved.shape[1], factors.shape[1]
    gram, cross = torch.zeros(width, width, dtype=torch.float64), torch.zeros(width, dim, dtype=torch.float64)
    rank, world = rank_and_world()
    blocks = RowBlocks(factors.shape[0], world)
    with raise_on_all_ranks():
        for first, last in _steps((blocks.start(rank), blocks.stop(rank)), (0, max(dim, width))):
            old = match.of(first, last)
            known = np.flatnonzero(old >= 0)
            now = _read_factors(factors, first, last)[known].double()
            gram += now.T @ now
            cross += now.T @ saved.rows(old[known], (0, dim)).double()
    gram, cross = all_reduce(gram), all_reduce(cross)
    if match.shared < width:
        return None
    ridge = _RIDGE * gram.diagonal().mean().clamp_min(1e-12)
    return torch.linalg.solve(gram + ridge * torch.eye(width, dtype=torch.float64), cross).float()


def _read_factors(factors: RowSource, first: int, last: int) -> torch.Tensor:
    return torch.from_numpy(np.array(factors[first:last], dtype=np.float32))


@torch.no_grad()
def _write(part: torch.Tensor, offset: int, rows: np.ndarray, values: torch.Tensor) -> None:
    part[torch.from_numpy(rows + offset).to(part.device)] = values.to(part)


def _steps(rows: tuple[int, int], columns: tuple[int, int]) -> list[tuple[int, int]]:
    step = max(1, BLOCK_BYTES // (4 * max(1, columns[1] - columns[0])))
    return [(first, min(first + step, rows[1])) for first in range(rows[0], rows[1], step)]


def _size(model: nn.Module, name: str) -> tuple[int, int]:
    weight = model.state_dict()[name]
    size = weight.metadata().size if hasattr(weight, "metadata") else weight.shape
    return int(size[0]), int(size[1])


def _short(name: str) -> str:
    """The table that `<path>.embedding_bags.<table>.weight` is of."""
    return name.removesuffix(".weight").rpartition(".")[2]


def _rows_are(space: IdSpace) -> str:
    return "trained" if space.factors is None else f"factors {space.factors}"


def _listed(names: Sequence[str]) -> str:
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
