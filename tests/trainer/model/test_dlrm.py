"""TorchRec's DLRM and DLRM_DCN on a GPU: no step waits for the device."""

import pytest
import torch
from torchrec import EmbeddingBagConfig, KeyedJaggedTensor
from torchrec.datasets.utils import Batch

from recpress.trainer.config import OptimizerConfig
from recpress.trainer.loop.optimizer import TrainOptimizer
from recpress.trainer.model.config import DCNConfig, DLRMConfig
from recpress.trainer.model.dlrm import make_dcn, make_dlrm
from recpress.trainer.model.inputs import ModelInputs
from recpress.trainer.model.sharding import shard
from recpress.trainer.model.trained import TrainedModel
from tests.fake_cuda import CUDA, backward, cuda_ids, fake_rank, ready, without_waiting

ROWS = 8


@pytest.mark.parametrize(
    ("make", "config"),
    [
        (make_dlrm, DLRMConfig(dense_layers=(16,), over_layers=(16,))),
        (make_dcn, DCNConfig(dense_layers=(16,), over_layers=(16,), cross_layers=2, low_rank=4)),
    ],
)
@pytest.mark.parametrize("dims", [(8, 8), (8, 4)])
def test_on_cuda_no_step_waits(make, config, dims):
    tables = [
        EmbeddingBagConfig(name=f"t{k}", num_embeddings=20, embedding_dim=dim, feature_names=[f"f{k}"])
        for k, dim in enumerate(dims)
    ]
    with fake_rank():
        model = TrainedModel(make(config, ModelInputs(tables, ["f0", "f1"], ["a", "b"], 8)), "dlrm")
        model._range_checked = True  # the first step waits to check the predictions
        dmp = ready(shard(model, CUDA, batch_size=ROWS))
        optimizer = TrainOptimizer(dmp, OptimizerConfig(), 9)
        features = KeyedJaggedTensor(
            ["f0", "f1"], cuda_ids(21), lengths=cuda_ids(2 * ROWS), stride=ROWS, length_per_key=[ROWS, 21 - ROWS]
        )
        batch = Batch(torch.empty(ROWS, 2), features, torch.empty(ROWS))
        assert batch.labels.device == CUDA

        def step():
            optimizer.zero_grad()
            loss, _ = dmp(batch)
            backward(loss, dmp)
            optimizer.step()
            return loss

        assert without_waiting(step).device == CUDA
