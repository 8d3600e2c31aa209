"""Models on the device "meta", with TorchRec's planner and DistributedModelParallel on two ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint import DefaultLoadPlanner
from torch.distributed.optim import _apply_optimizer_in_backward
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist

from recpress.modules import sharders
from recpress.modules.compression.replace import compress
from tests.modules.compression.model_cases import Train, dlrm, id_map, made
from tests.ranks import run_on_ranks

MAPS = {"t0": id_map(12, rows_per_id=2), "t1": id_map(10), "t3": id_map(9)}
CPU = torch.device("cpu")
BAGS = "model.sparse_arch.embedding_bag_collection.embedding_bags"


def trained(kind: str) -> nn.Module:
    """The model before compression, the same on every rank."""
    torch.manual_seed(7)
    return Train(dlrm(kind))


def shard(model: nn.Module, **options: Any) -> DistributedModelParallel:
    """As a script of TorchRec: its planner without constraints."""
    _apply_optimizer_in_backward(torch.optim.SGD, [p for n, p in model.named_parameters() if "bags" in n], {"lr": 0.1})
    chosen = sharders()
    planner = EmbeddingShardingPlanner(
        topology=Topology(world_size=dist.get_world_size(), compute_device="cpu"), batch_size=4
    )
    plan = planner.collective_plan(model, chosen, dist.group.WORLD)
    return DistributedModelParallel(model, device=CPU, plan=plan, sharders=chosen, **options)


def warm_start_and_checkpoint(folder: str, storage: str, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(output of the compressed model, that after a step)."""
    old = trained(kind)
    if dist.get_rank() == 0:
        checkpoint.save({"model": old.state_dict()}, checkpoint_id=f"{folder}/old", no_dist=True)
    dist.barrier()
    whole, _ = compress(trained(kind), MAPS, ["t2", "t3"], rows=f"{folder}/old", storage=storage)
    meta, report = compress(Train(dlrm(kind, device="meta")), MAPS, ["t2", "t3"], rows=f"{folder}/old", storage=storage)
    assert {p.device.type for n, p in meta.named_parameters() if "bags" in n} == {"meta"}
    model = shard(meta)
    dense = {k: v for k, v in old.state_dict().items() if "bags" not in k}
    assert not model.load_state_dict(dense, strict=False).unexpected_keys
    with torch.no_grad():
        before = model(made(dist.get_rank()))[1]
        torch.testing.assert_close(before, whole(made(dist.get_rank()))[1])
    report.load(model)  # not needed, and changes nothing
    assert set(model.fused_optimizer.state_dict()["state"]) == {f"{BAGS}.{t}.weight" for t in ("t0", "t1")}
    optimizer = torch.optim.SGD([p for n, p in model.named_parameters() if "bags" not in n], lr=0.1)
    pipeline = TrainPipelineSparseDist(model, optimizer, CPU, pipeline_postproc=True)
    batches = iter([made(dist.get_rank()), made(10 + dist.get_rank())])
    pipeline.progress(batches)
    after = pipeline.progress(batches)
    checkpoint.save({"model": model.state_dict()}, checkpoint_id=f"{folder}/new")
    served = report.state_dict(model)
    assert set(served) == set(old.state_dict())
    checkpoint.save(served, checkpoint_id=f"{folder}/served")
    return before, after


def resume(folder: str, storage: str, kind: str) -> torch.Tensor:
    """The output of the model that was saved on other ranks."""
    model, _ = compress(Train(dlrm(kind, device="meta")), MAPS, ["t2", "t3"], rows=f"{folder}/old", storage=storage)
    model = shard(model)
    state = {"model": model.state_dict()}
    checkpoint.load(state, checkpoint_id=f"{folder}/new")
    model.load_state_dict(state["model"])
    with torch.no_grad():
        return torch.stack([model(made(rank))[1] for rank in range(2)])


def plain_model_of_served(folder: str, kind: str) -> torch.Tensor:
    """A TorchRec model with the rows that `report.state_dict` exported."""
    model, _ = compress(trained(kind), MAPS)  # the exported t2 and t3 are shared and frozen rows, here trainable
    state = model.state_dict()
    checkpoint.load(state, checkpoint_id=f"{folder}/served", planner=DefaultLoadPlanner(allow_partial_load=True))
    model.load_state_dict(state)
    return torch.stack([model(made(rank))[1] for rank in range(2)])


@pytest.mark.parametrize(("kind", "storage"), [("dlrm", "int8"), ("dcn", "fp32")])
def test_a_meta_model_from_a_checkpoint(tmp_path: Path, kind: str, storage: str) -> None:
    run_on_ranks(warm_start_and_checkpoint, 2, str(tmp_path), storage, kind)
    resumed = run_on_ranks(resume, 1, str(tmp_path), storage, kind)[0]
    torch.testing.assert_close(plain_model_of_served(str(tmp_path), kind), resumed, atol=1e-4, rtol=1e-4)
