"""The sharded network of a log: its tables, its features, and the manifest from which it is built again."""

from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from recpress.data.dataset import artifact
from recpress.data.dataset.log import open_log
from recpress.data.errors import InputError
from recpress.data.negatives.samplers import UniformNegatives
from recpress.modules.als.factors import Factors, FactorTable
from recpress.modules.hashing.id_map import IdMap
from recpress.trainer.artifacts.factors import MODEL, describe_log
from recpress.trainer.distributed.process_group import Ranks
from recpress.trainer.model.two_tower import WEIGHTS, Features, build, describe_model, load_model
from recpress.trainer.model.weights import save_weights
from tests.ranks import run_on_ranks
from tests.trainer.small import CPU, DIM, ITEMS, USERS, config, factors

RANKS = Ranks(rank=0, world_size=1, device=CPU)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    rng, path = np.random.default_rng(0), tmp_path_factory.mktemp("log")
    users, items = np.arange(200) % USERS, np.arange(200) % ITEMS
    pq.write_table(pa.table({"user_id": users, "item_id": items}), path / "train.parquet")
    genres = [[k % 5, 4] for k in range(ITEMS)]
    pq.write_table(pa.table({"genres": genres, "price": rng.random(ITEMS)}), path / "items.parquet")
    Factors(*map(torch.from_numpy, factors()), USERS, ITEMS).save(path)
    return path


class Saved:
    """What `load_factors` takes of an artifact of factors."""

    def __init__(self, folder):
        self.table = lambda side, crossfit=False: FactorTable(folder, side)
        self.counts = lambda side, crossfit=False: np.ones((USERS if side == "user" else ITEMS, 1), np.float32)


def network(log, strategy="frozen", features=(), maps=None):
    made = build(
        config(strategy),
        log,
        Features.of(log, (), features),
        RANKS,
        dim=DIM,
        negatives=UniformNegatives(ITEMS, 2),
        batch_size=8,
        table_learning_rate=0.1,
        seed=0,
        maps=maps,
    )
    made.dmp.eval()
    return made


def ranked_as_factors(folder):
    made = network(open_log(folder))
    made.load_factors(Saved(folder))
    users, items = made.vectors("user")(torch.arange(USERS)), made.vectors("item")(torch.arange(ITEMS))
    return (users @ items.T).detach().numpy()


def test_residual_towers_start_with_the_scores_of_the_factors(folder):
    (found,) = run_on_ranks(ranked_as_factors, 1, folder)
    users, items = factors()
    np.testing.assert_allclose(found, users @ items.T, rtol=1e-4, atol=1e-5)


def shared(folder):
    id_map = IdMap(rows=(torch.arange(ITEMS) // 2)[:, None].int(), num_rows=ITEMS // 2)
    made = network(open_log(folder), maps={"item": id_map})
    made.load_factors(Saved(folder))
    return made.module.item.map is id_map, made.vectors("item")(torch.arange(ITEMS)).detach().numpy()


def test_a_row_behind_a_map_is_the_mean_of_its_ids(folder):
    ((mapped, found),) = run_on_ranks(shared, 1, folder)
    assert mapped
    mean = factors()[1].reshape(-1, 2, DIM).mean(1).repeat(2, axis=0)
    np.testing.assert_allclose(found[:, :DIM], mean, rtol=1e-4, atol=1e-5)


def saved_and_loaded(folder, out):
    log = open_log(folder)
    made = network(log, features=("genres", "price"))
    made.load_factors(Saved(folder))
    staging = artifact.begin(out, kind=MODEL)
    (staging / WEIGHTS).mkdir()
    save_weights(made.dmp, staging / WEIGHTS)
    model = describe_model(config(), DIM, (), ("genres", "price"))
    artifact.commit(staging, out, MODEL, {"log": describe_log(log), "model": model})
    ids = torch.arange(ITEMS)
    return made.vectors("item")(ids).detach(), load_model(str(out), log, RANKS).vectors("item")(ids).detach()


def test_a_model_is_built_again_from_its_manifest(folder, tmp_path):
    ((before, after),) = run_on_ranks(saved_and_loaded, 1, folder, tmp_path / "model")
    assert torch.equal(before, after)
    fingerprint = open_log(folder).vocabulary_fingerprint
    other = SimpleNamespace(path="other", num_users=USERS, num_items=ITEMS + 1, vocabulary_fingerprint=fingerprint)
    with pytest.raises(InputError, match=f"made for {ITEMS} items .*, but other has {ITEMS + 1}"):
        run_on_ranks(load_model, 1, str(tmp_path / "model"), other, RANKS)


def test_features_are_columns_of_the_side_tables(folder):
    log = open_log(folder)
    features = Features.of(log, (), ("price", "genres"))
    assert features.user is None
    assert features.item.float_names == ["price"]
    assert features.item.num_values() == {"genres": 5}
    with pytest.raises(InputError, match=r"users\.parquet: missing; expected it for the user features age"):
        Features.of(log, ("age",), ())
    with pytest.raises(InputError, match="colour"):
        Features.of(log, (), ("colour",))
