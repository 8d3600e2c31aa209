"""The tensors of a checkpoint, as one flat state: weights, optimizer states, random states, the window of metrics.

A checkpoint does not hold frozen tables, id maps and counts of ids. A resumed run loads them from its inputs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import nn

from recpress.data.seeds import key
from recpress.modules.fingerprints import is_fingerprint
from recpress.modules.two_tower.model import CountCodes
from recpress.trainer.checkpoint.checkpoints import Checkpoint
from recpress.trainer.checkpoint.staged import State
from recpress.trainer.loop.optimizer import TrainOptimizer

if TYPE_CHECKING:
    from recpress.trainer.observability.rec_metrics import RecMetrics


def collect(model: nn.Module, optimizer: TrainOptimizer, metrics: RecMetrics | None, device: torch.device) -> State:
    """All tensors that a checkpoint of this rank holds."""
    state = trained(model, optimizer) | _random_states(device)
    return state | (metrics.state() if metrics is not None else {})


def load(
    checkpoint: Checkpoint,
    model: nn.Module,
    optimizer: TrainOptimizer,
    metrics: RecMetrics | None,
    device: torch.device,
    group: dist.ProcessGroup | None,
) -> None:
    """Restore what `collect` returned, on any world size. Collective.

    With another world size, random states start anew, and the window of metrics is empty.

    Raises:
        InputError: a tensor is missing or has another shape. On every rank.
    """
    state = trained(model, optimizer)
    if checkpoint.run["world"] != dist.get_world_size():
        checkpoint.load(state, group)
        torch.manual_seed(
            key("resumed", torch.initial_seed(), checkpoint.run["result"]["steps"], dist.get_rank()) >> 64
        )
        return
    random = _random_states(device)
    window = metrics.state() if metrics is not None else {}
    if not checkpoint.has(window):  # saved without metrics, or with another window
        window = {}
    checkpoint.load(state | random | window, group)
    if metrics is not None and window:
        metrics.load(window)
    _restore_random(random, device)


def weights(model: nn.Module) -> State:
    """What training changes in the model: the dense part, and this rank's shards of the trainable tables."""
    fixed = tuple(f"{_plain(name)}." for name, module in model.named_modules() if isinstance(module, CountCodes))
    return {
        f"model/{name}": value
        for name, value in model.state_dict().items()
        if not (name.startswith(fixed or "\0") or is_fingerprint(name))  # `resume_check` compares the inputs
    }


def trained(model: nn.Module, optimizer: TrainOptimizer) -> State:
    """The weights, their average and the states of both optimizers; the same names on any number of ranks."""
    state = weights(model)
    for table, values in optimizer.fused.state_dict()["state"].items():
        state |= {f"table-optimizer/{table}/{name}": value for name, value in values.items()}
    for parameter, values in optimizer.dense_state():
        state |= {f"dense-optimizer/{_plain(parameter)}/{name}": value for name, value in values.items()}
    state |= {f"dense-average/{_plain(parameter)}": value for parameter, value in optimizer.averages()}
    if optimizer.scale is not None:
        state |= {f"gradient-scale/{name}": value for name, value in optimizer.scale.state().items()}
    return state


def _random_states(device: torch.device) -> dict[str, torch.Tensor]:
    """Copies of the states of torch's random generators of this rank."""
    rank = dist.get_rank()
    states = {f"random/cpu/{rank}": torch.get_rng_state()}
    if device.type == "cuda":
        states[f"random/cuda/{rank}"] = torch.cuda.get_rng_state(device)
    return states


def _restore_random(states: dict[str, torch.Tensor], device: torch.device) -> None:
    """Set torch's random generators of this rank."""
    rank = dist.get_rank()
    torch.set_rng_state(states[f"random/cpu/{rank}"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[f"random/cuda/{rank}"], device)


def _plain(name: str) -> str:
    """The name without the parts that wrappers add."""
    return ".".join(part for part in name.split(".") if part not in ("_dmp_wrapped_module", "module"))
