"""What a checkpoint holds of a training run, as one flat state: weights, optimizer states, random states.

Frozen tables, maps of ids and counts of ids are not in it: they come from the factors and maps again.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn

from recpress.modules.fingerprints import is_fingerprint
from recpress.modules.two_tower.model import CountCodes
from recpress.trainer.checkpoint.staged import State
from recpress.trainer.loop.optimizer import TrainOptimizer


def weights(model: nn.Module) -> State:
    """What training changes of the model: the dense part and this rank's shards of the trainable tables."""
    fixed = tuple(f"{_plain(name)}." for name, module in model.named_modules() if isinstance(module, CountCodes))
    return {
        f"model/{name}": value
        for name, value in model.state_dict().items()
        if not (name.startswith(fixed or "\0") or is_fingerprint(name))  # the run's inputs are compared instead
    }


def everything(model: nn.Module, optimizer: TrainOptimizer) -> State:
    """The weights and the states of both optimizers; the same names on every rank, on any number of ranks."""
    state = weights(model)
    for table, values in optimizer.fused.state_dict()["state"].items():
        state |= {f"table-optimizer/{table}/{name}": value for name, value in values.items()}
    for parameter, values in optimizer.dense_state():
        state |= {f"dense-optimizer/{_plain(parameter)}/{name}": value for name, value in values.items()}
    return state


def random_states(device: torch.device) -> dict[str, torch.Tensor]:
    """Copies of the states of torch's generators of this rank; `restore_random` takes them."""
    rank = dist.get_rank()
    states = {f"random/cpu/{rank}": torch.get_rng_state()}
    if device.type == "cuda":
        states[f"random/cuda/{rank}"] = torch.cuda.get_rng_state(device)
    return states


def restore_random(states: dict[str, torch.Tensor], device: torch.device) -> None:
    """Set torch's generators of this rank."""
    rank = dist.get_rank()
    torch.set_rng_state(states[f"random/cpu/{rank}"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[f"random/cuda/{rank}"], device)


def _plain(name: str) -> str:
    """A name without what wrappers add to it."""
    return ".".join(part for part in name.split(".") if part not in ("_dmp_wrapped_module", "module"))
