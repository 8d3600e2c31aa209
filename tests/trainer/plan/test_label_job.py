"""`recpress plan --model`: against the models that training builds, from sizes alone, and bad input."""

import os
from dataclasses import replace

import pytest
import torch

from recpress.modules.config import ALSConfig
from recpress.modules.hashing.learned_hash import LearnedHash
from recpress.trainer.cli import main
from recpress.trainer.distributed.process_group import process_group
from recpress.trainer.factorize.config import FactorizeConfig
from recpress.trainer.factorize.stage import factorize
from recpress.trainer.features.config import FeatureConfig, FeatureHash
from recpress.trainer.features.resolve import open_with_features, resolve_features
from recpress.trainer.model.trained import build_model
from recpress.trainer.model.weights import _frozen, dense_part, trainable_shards
from recpress.trainer.plan.config import ClusterConfig, PlanModelConfig
from recpress.trainer.plan.stage import plan
from tests.ranks import run_on_ranks
from tests.trainer.click_log import ITEMS, USERS, click_config, features, write_click_log
from tests.trainer.plan.jobs import line

GIB = 1 << 30
MACHINE = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    return write_click_log(tmp_path_factory.mktemp("shop") / "log")


@pytest.fixture(scope="module")
def factors(log, tmp_path_factory):
    out = str(tmp_path_factory.mktemp("factors") / "factors")
    factorize(FactorizeConfig(data=log, out=out, als=ALSConfig(factors=8, sweeps=1)))
    return out


def config(data, factory="dlrm", ranks=2, **changes):
    given = vars(click_config(data, "", factory, **changes))
    cluster = ClusterConfig(ranks_per_node=ranks, device="cpu", host_memory_gib=MACHINE)
    return PlanModelConfig(**given, cluster=cluster, compare=False)


def _built(config):
    """Bytes of the parts of this rank of the model that training builds."""
    with process_group("cpu") as ranks:
        log = open_with_features(config.data, config.schema, config.features, skip=False)
        found = resolve_features(log, config.features, maps=None, dim=config.dim, label="click")
        model = build_model(
            config.factory,
            config.model,
            found,
            ranks,
            batch_size=config.stream.batch_size,
            learning_rate=0.1,
            seed=0,
        )
        hashes = [module for module in model.dmp.modules() if isinstance(module, LearnedHash)]
        trained = [part for _, parts in trainable_shards(model.dmp) for _, part in parts]
        sizes = {
            "trainable tables": sum(part.nbytes for part in trained),
            "optimizer state": sum(4 * len(part) for part in trained),
            "frozen tables": sum(part.nbytes for _, _, _, parts in _frozen(model.dmp) for _, part in parts),
            "maps": sum(module.rows.nbytes for module in hashes),
            "dense part": 4 * sum(t.nbytes for _, t in dense_part(model.dmp) if t.is_floating_point()),
        }
        sides = found.sides.values()
        floats = [tensor for side in sides for tensor in side.floats.values()]
        ids = [values for side in sides if side.ids for values in side.ids.categorical.values()]
        flat = [part for values in ids for part in (values if isinstance(values, tuple) else (values,))]
        return sizes | {"side features": sum(tensor.nbytes for tensor in floats + flat)}


@pytest.mark.parametrize(("factory", "world"), [("dlrm", 2), ("dcn-v2", 1)])
def test_the_parts_are_those_of_the_model_that_training_builds(log, factors, factory, world):
    run = config(log, factory, world, features=features(factors))
    built = run_on_ranks(_built, world, run, timeout=600)
    planned = plan(run)
    for part in built[0]:
        assert line(planned["lines"], part) == pytest.approx(max(sizes[part] for sizes in built), rel=0.1), part
    tables = {row["table"]: row for row in planned["tables"]}
    assert tables["user_id"]["stored"] == "int8"
    assert tables["user_id"]["rows"] == "30"
    assert tables["item_id"]["rows"] == "20"


def test_a_model_of_your_own(log):
    from recpress.trainer.model.factory import config_of

    name = "examples.own_model:make"
    options = config_of(name)(hidden=(8,))
    run = config(log, name, 1, model=options, features={"user_id": FeatureConfig(), "item_id": FeatureConfig()})
    [built] = run_on_ranks(_built, 1, run, timeout=600)
    lines = plan(run)["lines"]
    for part in ("trainable tables", "optimizer state", "dense part"):
        assert line(lines, part) == pytest.approx(built[part], rel=0.1)
    assert line(lines, "activations") > 0


def test_activations_grow_with_the_batch(log):
    run = config(log, "dlrm", 1)
    sizes = [
        line(plan(replace(run, stream=replace(run.stream, batch_size=rows)))["lines"], "activations")
        for rows in (512, 1024, 2048)
    ]
    assert sizes[2] - sizes[1] == pytest.approx(2 * (sizes[1] - sizes[0]), rel=0.01)


def test_sizes_alone_give_the_same_tables(log, factors):
    given = features(factors)
    described = {
        "user_id": replace(given["user_id"], num_ids=USERS, dimension=8),
        "item_id": replace(given["item_id"], num_ids=ITEMS),
        "history": given["history"],
        "genres": replace(given["genres"], kind="list", num_ids=5),
        "age": replace(given["age"], num_ids=7),
        "price": FeatureConfig(kind="float"),
        "income": given["income"],
    }
    described["history"] = replace(described["history"], num_ids=ITEMS)
    of_log = plan(config(log, "dlrm", 2, features=given))
    alone = plan(config("", "dlrm", 2, features=described))
    assert alone["tables"] == of_log["tables"]
    for part in ("trainable tables", "frozen tables", "maps", "dense part", "activations"):
        assert line(alone["lines"], part) == line(of_log["lines"], part)


def test_a_billion_ids_need_no_memory():
    given = {
        "user_id": FeatureConfig(num_ids=1_000_000_000, frozen="factors", dimension=64, storage="int8"),
        "item_id": FeatureConfig(num_ids=100_000_000, hash=FeatureHash(method="double", rows=25_000_000)),
    }
    cluster = ClusterConfig(nodes=2, ranks_per_node=8)
    run = PlanModelConfig(factory="dlrm", model=config("").model, features=given, rows=10**10, cluster=cluster)
    found = plan(run)
    assert found["fits"]
    assert line(found["lines"], "maps") == 100_000_000 * 2 * 4
    assert line(found["lines"], "frozen tables") >= 1_000_000_000 * 80 / 16  # 64 codes and a scale, padded to 16 bytes
    assert set(found["variants"]) == {"as configured", "trainable, without maps", "trainable, hashed to 25 %"}
    peaks = {name: row["peak_per_rank"] for name, row in found["variants"].items()}
    assert peaks["as configured"] == found["peaks"]["device"]["train"] < peaks["trainable, without maps"]


@pytest.fixture
def toml(tmp_path):
    def write(text):
        (tmp_path / "plan.toml").write_text(text)
        return str(tmp_path / "plan.toml")

    return write


BAD = [
    ("[features.item_id]\nhash = {rows = 10}", "features.item_id.num_ids: missing"),
    ("[features.user_id]\nnum_ids = 5\nfrozen = 'x'", "features.user_id.dimension: missing"),
    ("[features.user_id]\nnum_ids = 5\nhash = {rows = 10}", "hash.rows is 10, but the table has 5 ids"),
    ("[features.price]\nkind = 'float'", "features: none with an embedding table"),
    ("[features.user_id]\nnum_ids = 5\ndimension = 6", "table 'user_id': dimension is 6, expected a multiple of 4"),
    ("maps = 'runs/maps'\n[features.user_id]\nnum_ids = 5", "maps: expected data"),
]


@pytest.mark.parametrize(("text", "message"), BAD)
def test_what_a_description_lacks_is_one_line(toml, text, message, capsys):
    assert main(["plan", "--model", "dlrm", "--config", toml(text)]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert message in lines[0]


def test_a_log_that_does_not_fit_is_one_line(log, toml, capsys):
    file = toml("[features.shoe]\n")
    command = ["plan", "--model", "dlrm", "--data", log]
    assert main([*command, "--schema.label", "click", "--config", file]) == 2
    assert "has no column 'shoe'" in capsys.readouterr().err
    assert main(command) == 2
    assert "no label; expected --schema.label" in capsys.readouterr().err
    assert main([*command, "--rows", "5"]) == 2
    assert "rows: set together with data" in capsys.readouterr().err


def test_the_file_of_train_serves_plan(log, toml, capsys):
    file = toml(f'data = "{log}"\nout = "x"\nmodel = "dlrm"\n[schema]\nlabel = "click"\n[features.item_id]\n')
    assert main(["plan", "--config", file, "--cluster.device", "cpu", "--no-compare"]) == 0
    out = capsys.readouterr().out
    assert "1 features in 1 tables" in out
    assert "item_id" in out
    assert not torch.distributed.is_initialized()
