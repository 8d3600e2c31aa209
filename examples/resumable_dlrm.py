"""Train a compressed DLRM on a log, on any number of ranks. Killed at any time, it resumes from its last checkpoint.

torchx run -s slurm recpress.script -j 2x8 --max_retries 3 -- examples/resumable_dlrm.py \\
    --data runs/criteo --maps runs/maps --out runs/dlrm

The log is one of `recpress synth-criteo` or `recpress ingest`, the maps are those of `recpress hash --features`.
"""

import argparse
import signal
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed import checkpoint
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig
from torchrec.distributed import DistributedModelParallel, TrainPipelineSparseDist
from torchrec.models.dlrm import DLRM, DLRMTrain
from torchrec.optim import RowWiseAdagrad
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from torchrec.optim.keyed import KeyedOptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter

from recpress.data.config import StreamConfig
from recpress.data.dataset.log import Log, open_log
from recpress.data.stream.float_transform import FloatTransform
from recpress.data.stream.keyed import KeyedBatches
from recpress.data.stream.loader import InteractionStream
from recpress.modules import IdMap, compress, sharders

STOPPED = 75
"""Exit status after a signal: the scheduler restarts the job."""
DIM = 16


def build(log: Log, maps: dict[str, IdMap], device: torch.device) -> DistributedModelParallel:
    sizes = {name: log.manifest["features"][name]["num_ids"] for name in log.schema.categorical}
    tables = [
        EmbeddingBagConfig(name=name, num_embeddings=size, embedding_dim=DIM, feature_names=[name])
        for name, size in sizes.items()
    ]
    collection = EmbeddingBagCollection(tables, device=torch.device("meta"))
    dlrm = DLRM(collection, len(log.schema.floats), [64, DIM], [64, 1], dense_device=device)
    model, _ = compress(DLRMTrain(dlrm), maps, warm_start=False)
    apply_optimizer_in_backward(RowWiseAdagrad, dlrm.sparse_arch.parameters(), {"lr": 0.1})
    return DistributedModelParallel(model, device=device, sharders=sharders())


def batches(log: Log, part: str, batch_size: int) -> KeyedBatches:
    rank, world = dist.get_rank(), dist.get_world_size()
    rows = {"train": log.train, "test": log.test}[part]
    stream = InteractionStream(rows, log.schema, StreamConfig(), rank=rank, world=world, global_batch=batch_size)
    return KeyedBatches(stream, transforms=dict.fromkeys(log.schema.floats, FloatTransform(log1p=True)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="log")
    parser.add_argument("--maps", required=True, help="folder of `recpress hash`: one map per feature")
    parser.add_argument(
        "--out", type=Path, required=True, help="folder of checkpoints, on storage that all nodes share"
    )
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--global-batch", type=int, default=4096)
    parser.add_argument("--checkpoint-steps", type=int, default=100)
    args = parser.parse_args()
    stop = []
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda number, _: stop.append(number))
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    local = torch.device("cuda", dist.get_node_local_rank()) if torch.cuda.is_available() else torch.device("cpu")
    torch.manual_seed(0)

    log = open_log(args.data, pairs=False)
    maps = {folder.name: IdMap.load(folder) for folder in Path(args.maps).iterdir() if folder.is_dir()}
    model = build(log, maps, local)
    dense = dict(in_backward_optimizer_filter(model.named_parameters()))
    optimizer = KeyedOptimizerWrapper(dense, lambda weights: torch.optim.Adagrad(weights, lr=0.01))
    train = batches(log, "train", args.global_batch)

    parts = {"model": model, "tables": model.fused_optimizer, "dense": optimizer}

    def save(step: int) -> None:
        state = {name: part.state_dict() for name, part in parts.items()}
        checkpoint.save(state, checkpoint_id=args.out / f"step-{step:08d}")

    step = 0
    complete = [folder.parent for folder in args.out.glob("step-*/.metadata")]  # DCP writes this file last
    found = [str(max(complete)) if complete else ""]
    dist.broadcast_object_list(found)
    if found[0]:
        step = int(found[0].rpartition("-")[2])
        state = {name: part.state_dict() for name, part in parts.items()}
        checkpoint.load(state, checkpoint_id=found[0])
        for name, part in parts.items():
            part.load_state_dict(state[name])
        print(f"resumed at step {step}", flush=True)
    pipeline = TrainPipelineSparseDist(model, optimizer, local, pipeline_postproc=True)
    while step < args.epochs * train.stream.steps_per_epoch:
        train.stream.set_epoch(*divmod(step, train.stream.steps_per_epoch))
        ahead = iter(train)
        for _ in range(len(train)):
            pipeline.progress(ahead)
            step += 1
            stopping = torch.tensor(float(bool(stop)), device=local)
            dist.all_reduce(stopping)  # a signal may reach the ranks at different steps
            if stopping or step % args.checkpoint_steps == 0:
                save(step)
            if stopping:
                print(f"stopped after step {step}", flush=True)
                sys.exit(STOPPED)
    save(step)
    pipeline.detach()

    model.eval()
    with torch.no_grad():
        test = [(model(batch.to(local))[0], batch.labels.numel()) for batch in batches(log, "test", args.global_batch)]
    total = torch.tensor([sum(loss * rows for loss, rows in test), sum(rows for _, rows in test)], device=local)
    dist.all_reduce(total)
    if dist.get_rank() == 0:
        print(f"step {step}: held-out log loss {total[0] / total[1]:.6f}", flush=True)


if __name__ == "__main__":
    main()
