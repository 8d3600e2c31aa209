"""Weights survive a change of ranks and of sharding, bit for bit, and damaged folders are refused."""

import numpy as np
import pytest
import torch

from recpress.data.errors import InputError
from recpress.modules.two_tower.model import TwoTower
from recpress.trainer.loop.config import FitConfig
from recpress.trainer.loop.fit import fit
from recpress.trainer.model.vectors import id_features, tower_vectors
from recpress.trainer.model.weights import Snapshot, load_weights, save_weights
from tests.ranks import run_on_ranks
from tests.trainer.small import CPU, ITEMS, USERS, batches, config, digest, sharded, sides


def vectors(dmp):
    dmp.eval()
    return [tower_vectors(dmp.module, side, device=CPU, chunk=7) for side in ("user", "item")]


def trained_and_saved(folder, strategy, layout):
    dmp, optimizer = sharded(strategy, layout=layout)
    fit(dmp, optimizer, batches, FitConfig(), device=CPU, show_progress=False)
    save_weights(dmp, folder)
    return vectors(dmp)


def loaded(folder, strategy, layout):
    dmp, _ = sharded(strategy, layout=layout)
    load_weights(dmp, folder)
    return vectors(dmp)


@pytest.mark.parametrize("strategy", ["frozen+residual", "warm-start"])
def test_other_ranks_and_another_sharding_give_the_same_vectors(strategy, tmp_path):
    on_two = run_on_ranks(trained_and_saved, 2, str(tmp_path), strategy, "row_wise")
    (on_one,) = run_on_ranks(loaded, 1, str(tmp_path), strategy, "table_wise")
    for side, rows in enumerate((USERS, ITEMS)):
        whole = torch.cat([ranks[side] for ranks in on_two])
        assert whole.shape[0] == rows
        # lookups give the same bits; products of another number of rows at once may round otherwise
        torch.testing.assert_close(on_one[side], whole, rtol=1e-5, atol=1e-6)

    plain = TwoTower(config(strategy), *sides())  # without DistributedModelParallel, for a stranger
    load_weights(plain, tmp_path)
    plain.eval()
    found = plain.user_vectors(id_features("user", torch.arange(USERS)))
    torch.testing.assert_close(found, on_one[0], rtol=1e-5, atol=1e-6)


def test_nothing_in_the_folder_is_a_pickle_that_could_run_code(tmp_path):
    run_on_ranks(trained_and_saved, 1, str(tmp_path), "frozen", "row_wise")
    torch.load(tmp_path / "dense.pt", weights_only=True)
    others = [path for path in tmp_path.rglob("*") if path.is_file() and path.name != "dense.pt"]
    assert others
    for path in others:
        np.load(path, allow_pickle=False)


def snapshots():
    dmp, optimizer = sharded("warm-start")
    kept, bits = Snapshot.take(dmp), digest(dmp)
    fit(dmp, optimizer, batches, FitConfig(), device=CPU, show_progress=False)
    assert digest(dmp) != bits
    kept.restore(dmp)
    return digest(dmp) == bits


def test_a_snapshot_brings_all_weights_back():
    assert run_on_ranks(snapshots, 2) == [True, True]


def refusals(folder, change):
    from pathlib import Path

    dmp, _ = sharded("frozen+residual")
    save_weights(dmp, folder)
    files = sorted(Path(folder).rglob("rows-*.npy"))
    if change == "missing":
        files[0].unlink()
    elif change == "truncated":
        files[0].write_bytes(files[0].read_bytes()[:-4])
    elif change == "type":
        np.save(files[0], np.load(files[0]).astype(np.float16))
    elif change == "dense":
        (Path(folder) / "dense.pt").write_bytes(b"no weights")
    elif change == "model":
        dmp, _ = sharded("frozen+residual", "mlp")
    load_weights(dmp, folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("missing", "no shard of this table"),
        ("truncated", "not a shard of a table"),
        ("type", "holds float16"),
        ("dense", "dense.pt: not the weights of a model"),
        ("model", "another configuration"),
    ],
)
def test_a_folder_that_does_not_fit_is_refused(change, message, tmp_path):
    with pytest.raises(InputError, match=message):
        run_on_ranks(refusals, 1, str(tmp_path), change)
