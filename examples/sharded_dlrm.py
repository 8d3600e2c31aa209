"""Train a sharded DLRM, then the same model with frozen and hashed tables. The lines for recpress are marked.

torchrun --nproc-per-node 2 examples/sharded_dlrm.py --out runs/full
torchrun --nproc-per-node 2 examples/sharded_dlrm.py --rows runs/full --maps runs/maps --frozen t_2 --out runs/small
torchrun --nproc-per-node 1 examples/sharded_dlrm.py --rows runs/full --maps runs/maps --frozen t_2 --resume runs/small

The rest is a common TorchRec script: a model on the device "meta", TorchRec's planner without constraints,
DistributedModelParallel, a pipeline, and checkpoints of torch.distributed.checkpoint. It trains on synthetic clicks.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed import checkpoint
from torch.distributed.optim import _apply_optimizer_in_backward
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor
from torchrec.datasets.utils import Batch
from torchrec.distributed import DistributedModelParallel, TrainPipelineSparseDist
from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
from torchrec.models.dlrm import DLRM, DLRMTrain
from torchrec.optim.keyed import KeyedOptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter

from recpress.modules import IdMap, compress, sharders  # recpress: 1

IDS, DIM, DENSE, BATCH = [3000, 200, 1000, 50], 16, 4, 256
KEYS = [f"f_{i}" for i in range(len(IDS))]


def clicks(steps: int, seed: int) -> Iterator[Batch]:
    """A click is likely if the id of f_0 is even."""
    rng = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        ids = torch.cat([(torch.rand(BATCH, generator=rng) ** 3 * size).long() for size in IDS])
        click = torch.rand(BATCH, generator=rng) < 0.1 + 0.8 * (ids[:BATCH] % 2 == 0)
        features = KeyedJaggedTensor(KEYS, ids, lengths=torch.ones(len(ids), dtype=torch.int32))
        yield Batch(torch.rand(BATCH, DENSE, generator=rng), features, click.int())


def evaluate(model: torch.nn.Module, device: torch.device) -> float:
    with torch.no_grad():
        losses = [model(batch.to(device))[0] for batch in clicks(10, seed=1_000_000)]
    return float(torch.stack(losses).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--out", help="folder for the checkpoint")
    parser.add_argument("--resume", help="checkpoint of this model")
    parser.add_argument("--rows", help="checkpoint of the full model, to start from")
    parser.add_argument("--maps", default="", help="folder of id maps, one folder per table")
    parser.add_argument("--frozen", nargs="*", default=[], help="tables that are not trained")
    args = parser.parse_args()
    if not dist.is_initialized():
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    device = torch.device("cuda", rank) if torch.cuda.is_available() else torch.device("cpu")
    torch.manual_seed(rank)

    tables = [
        EmbeddingBagConfig(name=f"t_{i}", num_embeddings=size, embedding_dim=DIM, feature_names=[KEYS[i]])
        for i, size in enumerate(IDS)
    ]
    collection = EmbeddingBagCollection(tables, device=torch.device("meta"))
    model = DLRMTrain(DLRM(collection, DENSE, [32, DIM], [32, 1], dense_device=device))
    _apply_optimizer_in_backward(torch.optim.SGD, model.model.sparse_arch.parameters(), {"lr": 0.5})
    if args.rows:
        maps = {folder.name: IdMap.load(folder) for folder in Path(args.maps).iterdir()}  # recpress: 2
        model, _ = compress(model, maps, args.frozen, rows=args.rows)  # recpress: 3
    topology = Topology(world_size=world, local_world_size=world, compute_device=device.type)
    planner = EmbeddingShardingPlanner(topology=topology, batch_size=BATCH)
    chosen = sharders()  # recpress: 4, instead of get_default_sharders()
    plan = planner.collective_plan(model, chosen, dist.GroupMember.WORLD)
    model = DistributedModelParallel(model, device=device, plan=plan, sharders=chosen)
    dense = dict(in_backward_optimizer_filter(model.named_parameters()))
    optimizer = KeyedOptimizerWrapper(dense, lambda weights: torch.optim.SGD(weights, lr=0.5))

    if args.resume:
        state = {"model": model.state_dict(), "tables": model.fused_optimizer.state_dict()}
        checkpoint.load(state, checkpoint_id=args.resume)
        model.load_state_dict(state["model"])
        model.fused_optimizer.load_state_dict(state["tables"])
    else:
        pipeline = TrainPipelineSparseDist(model, optimizer, device, pipeline_postproc=True)  # recpress: 5, the option
        batches = clicks(args.steps, seed=rank)
        for _ in range(args.steps):
            pipeline.progress(batches)
        pipeline.detach()
        if args.out:
            state = {"model": model.state_dict(), "tables": model.fused_optimizer.state_dict()}
            checkpoint.save(state, checkpoint_id=args.out)
    loss = evaluate(model, device)
    if rank == 0:
        print(f"log loss {loss:.6f}")


if __name__ == "__main__":
    main()
