"""Contrastive factorization, sharded over ranks: row-wise Adam on batches of users with all their positives."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

from recpress.modules.als.exchange import Exchange
from recpress.modules.als.factorization import initial_factors
from recpress.modules.als.factors import Factors
from recpress.modules.als.interactions import CSR, InteractionBuilder
from recpress.modules.config import ALSParameters, ContrastiveConfig
from recpress.modules.contrastive.batches import Batch, BatchMaker, NegativeSampler
from recpress.modules.contrastive.held_out import HeldOut
from recpress.modules.contrastive.item_table import ItemTable, Request
from recpress.modules.contrastive.losses import Loss, Scores, make_loss
from recpress.modules.contrastive.row_adam import RowAdam

DEFAULTS: dict[str, Any] = {"temperature": 0.1, "epochs": 150, "popularity_exponent": 0.05}
"""Settings that are not given. `auto.choose` chooses them by the interactions."""
WARM_UP = 20
"""Steps at the start with a smaller learning rate."""
LAST_RATE = 0.05
"""Learning rate at the end, in units of that at the start."""
_DEVIATION = 0.1  # of the elements of initial vectors
_AHEAD = 32  # batches to cut and to request from other ranks at once
CHECK_EVERY = 5
"""Epochs between two checks of early stopping."""
LAST_PART = 0.1
"""Share of the epochs, at the end, that train on all interactions, with early stopping."""
LONGEST = 1e4
"""A longer vector has exploded. Lengths grow to about 30, as gradients are orthogonal to unit vectors."""


@dataclass(frozen=True)
class EpochReport:
    """A finished epoch."""

    epoch: int
    """Its number, from 1."""
    epochs: int
    loss: float
    """Mean over the interactions."""
    seconds: float
    eta: float
    """Expected seconds for the remaining epochs."""


class Contrastive:
    """Factorizes the interactions of all ranks by a loss of cosines. Use it as `ALS`.

    Users and items are sharded in contiguous blocks (`RowBlocks`). A step takes users of every rank with all their
    interactions; each rank fetches the items that its users need, and sends their gradients back. `fit` returns users
    of length one and items of length count ** popularity_exponent, so the score of a pair is its cosine times a power
    of the item's count. Ids without interactions have zero vectors.

    Memory of a rank: its interactions, three times its block of vectors, 16 bytes per item of the log, and some batches
    of at most `batch_limit` interactions.

    Args:
        config: settings.
        device: device of the vectors.
        process_group: None for the default group, or for one process if none is initialized.

    Raises:
        ValueError: a setting or a number of ids is out of range.

    Example:
        >>> model = Contrastive(ContrastiveConfig(factors=8, epochs=3), num_users=3, num_items=4)
        >>> model.add([0, 0, 1, 2], [0, 1, 1, 3])
        >>> model.fit().users.norm(dim=1).round()
        tensor([1., 1., 1.])
    """

    def __init__(
        self,
        config: ContrastiveConfig,
        num_users: int,
        num_items: int,
        *,
        device: str | torch.device = "cpu",
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        check(config)
        self.config, self.num_users, self.num_items = with_defaults(config), num_users, num_items
        self.exchange = Exchange(process_group, torch.device(device))
        self.builder = InteractionBuilder(num_users, num_items, self.exchange)

    def add(self, users: Any, items: Any, values: Any = None) -> None:
        """Add interactions of any users and items, as `ALS.add`. A value multiplies the weight of the interaction."""
        self.builder.add(np.asarray(users), np.asarray(items), None if values is None else np.asarray(values))

    def fit(
        self, on_epoch: Callable[[EpochReport], bool | None] | None = None, start: Factors | None = None
    ) -> Factors:
        """Factorize the interactions that were added, and drop them. Collective.

        Args:
            on_epoch: called with the report of each epoch. True, on any rank, stops the training.
            start: initial factors with this sharding, instead of random ones. They are not changed.

        Raises:
            ValueError: there are no interactions; the loss is not finite; a vector's length explodes.
        """
        run = self.prepare(start)
        run.train(on_epoch)
        return run.factors()

    def prepare(self, start: Factors | None = None, interactions: tuple[CSR, CSR] | None = None) -> Run:
        """The training on the interactions that were added, before its first epoch. As `fit`.

        Args:
            interactions: by user and by item, instead of those that were added. They are not changed.
        """
        pair = self.builder.build() if interactions is None else interactions
        return Run(self.config, *pair, self.num_users, self.num_items, self.exchange, start)


class Run:
    """The training on given interactions, epoch by epoch. Methods are collective.

    Args:
        start: initial factors with this sharding, instead of random ones.
        tables: instead of `start`: this rank's users and items, which are changed in place.
    """

    def __init__(
        self,
        config: ContrastiveConfig,
        by_user: CSR,
        by_item: CSR,
        num_users: int,
        num_items: int,
        exchange: Exchange,
        start: Factors | None = None,
        tables: tuple[RowAdam, RowAdam] | None = None,
    ) -> None:
        self.config = config = with_defaults(config)
        self.exchange, self.num_users, self.num_items = exchange, num_users, num_items
        self.user_counts, self.item_counts = np.diff(by_user.indptr), np.diff(by_item.indptr)
        self.epoch = 0
        """Epochs that are finished."""
        self.total = _weight_sum(by_user, np.ones(by_user.num_rows), exchange)
        if not self.total > 0:
            raise ValueError("contrastive: no interactions to fit, expected at least one with a positive value")
        weight = np.maximum(self.user_counts, 1.0) ** -config.user_exponent
        weight *= self.total / _weight_sum(by_user, weight, exchange)
        if tables is None:
            begin = _initial(config, num_users, num_items, exchange) if start is None else start
            length = _DEVIATION * math.sqrt(begin.dim)
            users, items = (F.normalize(table.to(exchange.device)).mul_(length) for table in (begin.users, begin.items))
            tables = RowAdam(users), RowAdam(items)
        self.users = tables[0]
        self.items = ItemTable(tables[1], num_items, exchange)
        counts = _all_counts(by_item, num_items, exchange)
        self.sampler = NegativeSampler(counts, config.negative_exponent)

        def maker(users: CSR) -> BatchMaker:
            return BatchMaker(
                users,
                weight.astype(np.float32),
                self.sampler,
                negatives=config.negatives,
                most_users=-(-config.batch_users // exchange.world),
                most_positives=config.batch_limit,
            )

        self._maker = maker(by_user)
        self._loss = make_loss(config)
        assert config.epochs is not None
        self.epochs: int = config.epochs
        """Epochs in all. Early stopping lowers it."""
        self.stopped: int | None = None
        """Epochs before an early stop."""
        self.checks: list[float] = []
        """NDCG@10 of the held-out interactions at each check."""
        self._held_out = HeldOut(by_user, counts, config.seed, exchange) if config.patience else None
        self._reduced_maker = None if self._held_out is None else maker(self._held_out.train)

    def train(self, on_epoch: Callable[[EpochReport], bool | None] | None = None) -> None:
        """Train the epochs that remain. Raises ValueError as `Contrastive.fit`."""
        began, first = time.perf_counter(), self.epoch
        while self.epoch < self.epochs:
            at = time.perf_counter()
            loss = self._train_epoch()
            self.epoch += 1
            self._check(loss)
            self._stop_early()
            now = time.perf_counter()
            left = (now - began) / (self.epoch - first) * (self.epochs - self.epoch)
            report = EpochReport(self.epoch, self.epochs, loss, now - at, left)
            stop = on_epoch is not None and bool(on_epoch(report))
            if self.exchange.max(int(stop)):
                break

    def position(self) -> dict[str, Any]:
        """Where the training is, as JSON values, besides the tables."""
        return {"epoch": self.epoch, "epochs": self.epochs, "stopped": self.stopped, "checks": self.checks}

    def resume(self, position: dict[str, Any]) -> None:
        """Continue from a `position`, with the tables of then."""
        self.epoch, self.epochs = position["epoch"], position["epochs"]
        self.stopped, self.checks = position["stopped"], list(position["checks"])

    def factors(self) -> Factors:
        """The vectors. Those of ids without interactions are zero."""
        tables = self.users.units(), self._item_vectors()
        all_counts = self.user_counts, self.item_counts
        for table, counts in zip(tables, all_counts, strict=True):
            table[torch.from_numpy(counts == 0).to(table.device)] = 0
        size = self.num_users, self.num_items, self.exchange.rank, self.exchange.world
        return Factors(*tables, *size, *(torch.from_numpy(counts.astype(np.float32)) for counts in all_counts))

    def _item_vectors(self) -> torch.Tensor:
        return self.items.adam.units().mul_(item_lengths(self.config, self.item_counts, self.exchange.device))

    def _train_epoch(self) -> float:
        """Train one epoch; return the mean loss."""
        config, exchange = self.config, self.exchange
        rng = np.random.default_rng([config.seed % 2**32, exchange.rank, self.epoch])
        maker = self._maker if self._reduced_maker is None or self._ending else self._reduced_maker
        parts = maker.epoch(rng)
        steps = exchange.max(len(parts))
        empty = np.empty(0, np.int64)
        made = (maker.make(parts[k] if k < len(parts) else empty, rng) for k in range(steps))
        total = torch.zeros((), dtype=torch.float64, device=exchange.device)
        for step, (batch, request) in enumerate(self._with_requests(made)):
            rate = self._rate(self.epoch + step / steps, self.epoch * steps + step)
            total += self._step(batch, request, rate)
        return float(exchange.sum(total)) / self.total

    def _rate(self, epochs: float, steps: int) -> float:
        assert self.config.epochs is not None
        share = 1 - (1 - LAST_RATE) * epochs / self.config.epochs
        if self.stopped is not None:  # falls faster from where it was
            before = 1 - (1 - LAST_RATE) * self.stopped / self.config.epochs
            share = before + (LAST_RATE - before) * (epochs - self.stopped) / (self.epochs - self.stopped)
        return self.config.learning_rate * share * min(1.0, (steps + 1) / WARM_UP)

    @property
    def _ending(self) -> bool:
        """Whether the epochs are the last ones of a training with early stopping."""
        return self.stopped is not None or self.epoch >= (1 - LAST_PART) * self.epochs

    def _stop_early(self) -> None:
        """Check the held-out interactions, if it is time; lower the number of epochs if they do not improve."""
        if self._held_out is None or self._ending or self.epoch % CHECK_EVERY:
            return
        self.checks.append(self._held_out.ndcg(self.users.units(), self._item_vectors()))
        if len(self.checks) - 1 - int(np.argmax(self.checks)) >= self.config.patience:
            self.stopped = self.epoch
            self.epochs = self.epoch + max(1, round(LAST_PART * self.epoch))

    def _with_requests(self, made: Iterator[Batch]) -> Iterator[tuple[Batch, Request]]:
        while ahead := list(islice(made, _AHEAD)):
            yield from zip(ahead, self.items.requests(ahead), strict=True)

    def _step(self, batch: Batch, request: Request, rate: float) -> torch.Tensor:
        """Train on one batch; return the sum of its loss. No work waits for the device."""
        item, read = self.items.read(request)
        if not len(batch.users):  # other ranks have more batches
            self.items.step(request, read, torch.zeros_like(item), rate)
            return item.new_zeros(())
        on = to_device(batch, self.exchange.device)
        user, inverse = self.users.read(on.users)
        loss, user_gradient, item_gradient = gradients(self._loss, on, user, item, self.sampler.num_items)
        self.users.step(on.users, user, inverse, user_gradient, rate)
        self.items.step(request, read, item_gradient, rate)
        return loss

    def _check(self, loss: float) -> None:
        """Raise ValueError if the training has diverged."""
        lengths = [adam.rows.norm(dim=1).amax() if len(adam.rows) else 0.0 for adam in (self.users, self.items.adam)]
        longest = self.exchange.max(min(int(torch.nan_to_num(torch.tensor(lengths), nan=2**60).max()), 2**60))
        if not math.isfinite(loss) or longest > LONGEST:
            what = f"the loss is {loss}" if not math.isfinite(loss) else f"a vector has the length {longest:.3g}"
            raise ValueError(
                f"contrastive: {what} after epoch {self.epoch}, expected a finite loss and lengths below {LONGEST:g}; "
                "lower learning_rate or raise temperature"
            )


@dataclass
class _OnDevice:
    """The arrays of `Batch` as tensors."""

    users: torch.Tensor
    indptr: torch.Tensor
    row: torch.Tensor
    positive: torch.Tensor
    weight: torch.Tensor
    negative: torch.Tensor
    log_expected: torch.Tensor
    by_item: torch.Tensor
    item_indptr: torch.Tensor


def to_device(batch: Batch, device: torch.device) -> _OnDevice:
    names = list(_OnDevice.__dataclass_fields__)
    arrays = [torch.from_numpy(getattr(batch, name)) for name in names]
    if device.type != "cpu":  # two copies that the host does not wait for
        moved: list[torch.Tensor] = [torch.empty(0)] * len(arrays)
        for dtype in {array.dtype for array in arrays}:
            places = [k for k, array in enumerate(arrays) if array.dtype == dtype]
            joined = torch.cat([arrays[k] for k in places]).pin_memory().to(device, non_blocking=True)
            for k, part in zip(places, joined.split([len(arrays[k]) for k in places]), strict=True):
                moved[k] = part
        arrays = moved
    return _OnDevice(**dict(zip(names, arrays, strict=True)))


def gradients(
    loss: Loss, batch: _OnDevice, user: torch.Tensor, item: torch.Tensor, num_items: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Loss of a batch, (), and its gradients by the unit vectors of users, (B, d), and items, (k, d)."""
    negative = item.index_select(0, batch.negative)
    scores = Scores(
        positive=_dots(user, item, batch),
        negative=user @ negative.T,
        row=batch.row,
        weight=batch.weight,
        row_weight=user.new_zeros(len(user)).index_add_(0, batch.row, batch.weight),
        log_expected=batch.log_expected,
        num_items=num_items,
    )
    value, of_positive, of_negative = loss(scores)
    of_user = F.embedding_bag(
        batch.positive, item, batch.indptr, mode="sum", per_sample_weights=of_positive, include_last_offset=True
    ).addmm_(of_negative, negative)
    of_item = F.embedding_bag(
        batch.row.index_select(0, batch.by_item), user, batch.item_indptr,
        mode="sum", per_sample_weights=of_positive.index_select(0, batch.by_item), include_last_offset=True,
    )  # fmt: skip
    return value, of_user, of_item.index_add_(0, batch.negative, of_negative.T @ user)


def _dots(user: torch.Tensor, item: torch.Tensor, batch: _OnDevice) -> torch.Tensor:
    """Cosine of each positive pair, (P,)."""
    if user.is_cuda:
        return (user.index_select(0, batch.row) * item.index_select(0, batch.positive)).sum(1)
    pattern = torch.sparse_csr_tensor(
        batch.indptr, batch.positive, user.new_zeros(len(batch.positive)), (len(user), len(item)),
        check_invariants=False,
    )  # fmt: skip
    torch.sparse.sampled_addmm(pattern, user, item.t(), beta=0.0, out=pattern)
    return pattern.values()


def aligned(factors: Factors, target: Factors, exchange: Exchange) -> Factors:
    """`factors`, rotated as near to `target` as a rotation of the space brings them; no score changes. Collective."""
    pairs = ((factors.users, target.users), (factors.items, target.items))
    cross = exchange.sum(torch.stack([(own.T @ other).double() for own, other in pairs]).sum(0))
    left, _, right = torch.linalg.svd(cross)
    rotation = (left @ right).float()
    return replace(factors, users=factors.users @ rotation, items=factors.items @ rotation)


def item_lengths(config: ContrastiveConfig, counts: np.ndarray, device: torch.device | None = None) -> torch.Tensor:
    """Lengths (n, 1) of the vectors of items with these numbers of interactions, (n,)."""
    exponent = with_defaults(config).popularity_exponent
    return torch.from_numpy(np.maximum(counts, 1).astype(np.float32)[:, None] ** exponent).to(device)


def _initial(config: ContrastiveConfig, num_users: int, num_items: int, exchange: Exchange) -> Factors:
    parameters = ALSParameters(factors=config.factors, seed=config.seed)
    return initial_factors(parameters, num_users, num_items, exchange.rank, exchange.world, exchange.device)


def _weight_sum(csr: CSR, weight: np.ndarray, exchange: Exchange) -> float:
    """Sum over the interactions of all ranks of the weight of their row, (rows,), times their value."""
    each = np.repeat(weight, np.diff(csr.indptr))
    total = float(each.sum() if csr.values is None else (each * csr.values).sum())
    return float(exchange.sum(torch.tensor(total, dtype=torch.float64, device=exchange.device)))


def _all_counts(by_item: CSR, num_items: int, exchange: Exchange) -> np.ndarray:
    """Interactions of every item of the log, (num_items,), on each rank."""
    counts = torch.zeros(num_items, dtype=torch.int64, device=exchange.device)
    own = torch.from_numpy(np.diff(by_item.indptr))
    counts[by_item.start : by_item.start + len(own)] = own.to(exchange.device)
    return exchange.sum(counts).cpu().numpy()


_RANGES: dict[str, tuple[float, float]] = {
    "factors": (1, 1 << 14),
    "temperature": (0.02, 1.0),
    "margin": (-1.0, 1.0),
    "negative_weight": (0.0, math.inf),
    "epochs": (1, math.inf),
    "patience": (0, math.inf),
    "learning_rate": (1e-6, 1.0),
    "batch_users": (1, 1 << 20),
    "batch_limit": (128, 1 << 24),
    "negatives": (1, 1 << 20),
    "negative_exponent": (0.0, 1.0),
    "user_exponent": (0.0, 1.0),
    "popularity_exponent": (0.0, 1.0),
}


def with_defaults(config: ContrastiveConfig) -> ContrastiveConfig:
    """`config`, in which `DEFAULTS` fills in what is not given."""
    return replace(config, **{name: value for name, value in DEFAULTS.items() if getattr(config, name) is None})


def check(config: ContrastiveConfig) -> None:
    """Raise ValueError that names the first setting that is out of range."""
    if config.loss not in ("softmax", "ccl", "logistic"):
        raise ValueError(f"contrastive: loss is {config.loss!r}, expected softmax, ccl or logistic")
    values = asdict(with_defaults(config))
    for name, (least, most) in _RANGES.items():
        if not least <= values[name] <= most:
            expected = f"{least:g} to {most:g}" if math.isfinite(most) else f"at least {least:g}"
            raise ValueError(f"contrastive: {name} is {values[name]}, expected {expected}")
