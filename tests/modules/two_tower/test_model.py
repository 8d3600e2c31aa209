"""The two-tower module on its own, without ranks."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torchrec import KeyedJaggedTensor

from recpress.modules.als.exchange import Exchange
from recpress.modules.config import LossConfig, TablesConfig, TowersConfig, TwoTowerConfig
from recpress.modules.hashing.id_map import IdMap
from recpress.modules.hashing.learned_hash import LearnedHash
from recpress.modules.hashing.shared_rows import IdVectors, shared_rows
from recpress.modules.row_source import LogCounts
from recpress.modules.two_tower.model import CountCodes, MappedRows, SideSpec, TwoTower
from tests.modules.two_tower.model_cases import DIM, ITEMS, USERS, build, factors, keyed, scores
from tests.ranks import run_on_ranks


class Rows:
    """What a batch is to the model."""

    def __init__(self, model, seed=0, negatives=2, rows=5):
        generator = torch.Generator().manual_seed(seed)
        self.user_features = keyed(user=torch.randint(USERS, (rows,), generator=generator))
        self.item_features = keyed(item=torch.randint(ITEMS, (rows * (1 + negatives),), generator=generator))
        self.label, self.log_q = torch.ones(rows), torch.zeros(rows * (1 + negatives))
        self.excluded = self.user_floats = self.item_floats = None


@pytest.mark.parametrize("strategy", ["random", "warm-start", "frozen", "frozen+residual"])
@pytest.mark.parametrize("kind", ["mlp", "residual"])
def test_a_few_steps_lower_the_loss_and_move_what_should_move(strategy, kind):
    model = build(strategy, kind)
    batch = Rows(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    tables = {name: p for name, p in model.named_parameters() if "_tables" in name}
    assert (
        sorted({name.split(".")[2] for name in tables})
        == {
            "random": ["item", "user"],
            "warm-start": ["item", "user"],
            "frozen": [],
            "frozen+residual": ["item_plus", "user_plus"],
        }[strategy]
    )
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss, shown = model(batch)
        assert not shown.requires_grad
        loss.backward()
        optimizer.step()
        losses.append(float(shown))
    assert losses[-1] < losses[0]
    assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters() if "gate.0" not in name)
    if "freeze" in strategy:
        ((_, stored),) = model.user_frozen.decoded("user")
        assert torch.equal(stored[:, :DIM], torch.from_numpy(factors()[0]))


def test_factors_can_be_swapped():
    user, item = factors()
    model = build()
    model.load_factors(2 * user, item)
    torch.testing.assert_close(scores(model), torch.from_numpy(2 * user @ item.T))


def test_eight_bit_tables_score_nearly_the_same():
    user, item = factors()
    assert (scores(build(storage="int8")) - torch.from_numpy(user @ item.T)).abs().max() < 0.02


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="starts from factors"):
        TwoTower(TwoTowerConfig(), SideSpec(key="user", rows=3), SideSpec(key="item", rows=3))
    with pytest.raises(ValueError, match="expected that of item vectors"):
        TwoTower(TwoTowerConfig(), SideSpec(key="user", rows=3, dim=4), SideSpec(key="item", rows=3, dim=8))
    user, item = factors()
    with pytest.raises(ValueError, match="8 rows, expected 9"):
        build().load_factors(user[:8], item)


def with_history(strategy, history):
    config = TwoTowerConfig(
        tables=TablesConfig(strategy=strategy, dim=8, history=history),
        towers=TowersConfig(kind="residual", hidden=(4,)),
    )
    torch.manual_seed(0)
    counted = strategy != "random"
    user = SideSpec(key="user", rows=USERS, dim=DIM, counted=counted and history == "add", history=ITEMS)
    model = TwoTower(config, user, SideSpec(key="item", rows=ITEMS, dim=DIM, counted=counted))
    if counted:
        model.load_factors(*factors())
        model.load_counts(np.zeros((USERS, 1), np.float32), np.zeros((ITEMS, 1), np.float32))
    return model.eval()


LISTS = [[0, 3, 3], [6], [], [2, 5]]
HISTORIES = KeyedJaggedTensor(
    ["user", "history"], torch.tensor([0, 1, 2, 3, 0, 3, 3, 6, 2, 5]), lengths=torch.tensor([1, 1, 1, 1, 3, 1, 0, 2])
)


@pytest.mark.parametrize("strategy", ["frozen", "warm-start", "random"])
def test_the_items_of_a_user_replace_the_row_of_the_user(strategy):
    model = with_history(strategy, "only")
    assert model.table_bytes.keys() - {"item_count"} == {"user_history", "item"}
    rows = torch.from_numpy(factors()[1])
    if strategy == "random":
        rows = model.user_tables.state_dict()["embedding_bags.user_history.weight"]
    sums = torch.stack([rows[items].sum(0) for items in LISTS])
    found = model.user_vectors(HISTORIES)
    torch.testing.assert_close(found[:, : sums.shape[1]], sums / sums.norm(dim=1, keepdim=True).clamp(min=1e-9))
    assert found[2, :-1].abs().max() == 0  # of a user without items


@pytest.mark.parametrize("strategy", ["frozen", "frozen+residual", "warm-start"])
def test_with_the_items_of_a_user_added_the_first_scores_are_those_of_the_factors(strategy):
    model = with_history(strategy, "add")
    user, item = factors()
    found = model.user_vectors(HISTORIES) @ model.item_vectors(keyed(item=range(ITEMS))).T
    torch.testing.assert_close(found, torch.from_numpy(user[:4] @ item.T))
    torch.nn.init.normal_(model.user_tower.mlp[-1].weight)
    moved = model.user_vectors(HISTORIES)
    without = KeyedJaggedTensor(HISTORIES.keys(), torch.arange(4), lengths=torch.tensor([1, 1, 1, 1, 0, 0, 0, 0]))
    same = (moved - model.user_vectors(without)).abs().amax(1) < 1e-6
    assert same.tolist() == [False, False, True, False]


def test_items_cannot_replace_rows_that_others_are_added_to():
    with pytest.raises(ValueError, match="history 'only'"):
        with_history("frozen+residual", "only")


def id_map(ids, rows=4, rows_per_id=1, weighted=False):
    rng = np.random.default_rng(3)
    weights = torch.from_numpy(rng.uniform(0.5, 1.5, (ids, rows_per_id)).astype(np.float32)) if weighted else None
    found = torch.from_numpy(rng.integers(rows, size=(ids, rows_per_id)).astype(np.int32))
    return IdMap(rows=found, num_rows=rows, weights=weights)


def test_rows_are_the_weighted_means_of_the_ids_that_share_them():
    shared = IdMap(rows=torch.tensor([[0], [2], [0], [2]], dtype=torch.int32), num_rows=4)
    vectors = np.array([[1.0, 0], [0, 2], [4, 3], [0, 8]], np.float32)
    counts = np.array([[1.0], [1], [2], [0]], np.float32)  # no count weighs 0.1
    found = shared_rows(shared, vectors, counts)
    want = [[3, 2], [0, 0], [0, 2.8 / 1.1], [0, 0]]  # nobody has rows 1 and 3
    torch.testing.assert_close(found, torch.tensor(want))
    torch.testing.assert_close(shared_rows(shared, vectors)[2], torch.tensor([0.0, 5.0]))


@pytest.mark.parametrize("rows_per_id", [1, 2])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("counted", [False, True])
def test_rows_are_the_least_squares_ones(rows_per_id, weighted, counted):
    """No other rows fit the vectors better: the residuals are orthogonal to the map."""
    made = id_map(30, 8, rows_per_id, weighted)
    rng = np.random.default_rng(4)
    vectors = rng.normal(size=(30, 3)).astype(np.float32)
    counts = rng.uniform(1, 9, (30, 1)).astype(np.float32) if counted else None
    rows = shared_rows(made, vectors, counts)
    mapping = torch.zeros(30, 8)
    weights = torch.ones(30, rows_per_id) if made.weights is None else made.weights
    mapping.scatter_add_(1, made.rows.long(), weights)
    each = torch.ones(30, 1) if counts is None else torch.from_numpy(counts)
    residual = each * (torch.from_numpy(vectors) - mapping @ rows)
    # the ridge of 1e-6 and the 12 steps of conjugate gradients leave a little
    assert float((mapping.T @ residual).abs().max()) < 0.02
    torch.testing.assert_close(IdVectors(made, rows)[3:9], (mapping @ rows)[3:9])
    torch.testing.assert_close(IdVectors(made, rows.numpy())[3:9], (mapping @ rows)[3:9])


def test_rows_that_cannot_be_worked_out_are_refused():
    vectors = np.ones((9, 3), np.float32)
    with pytest.raises(ValueError, match="table 'user': vectors of 9 ids, but its map has 8"):
        shared_rows(id_map(8), vectors, table="user")
    with pytest.raises(ValueError, match="counts of 8 ids, but its map has 9"):
        shared_rows(id_map(9), vectors, vectors[:8, :1])
    with pytest.raises(ValueError, match="a count of ids 0 to 8 is NaN"):
        shared_rows(id_map(9), vectors, np.full((9, 1), np.nan, np.float32))


class Counted:
    """A matrix that knows how many of its rows were read."""

    def __init__(self, matrix):
        self.matrix, self.shape, self.read = matrix, matrix.shape, set()

    def __getitem__(self, index):
        at = index[0] if isinstance(index, tuple) else index
        self.read |= set(range(*at.indices(self.shape[0])))
        return self.matrix[index]


def large(rows_per_id, dim):
    rng = np.random.default_rng(6)
    return id_map(101, 20, rows_per_id, weighted=True), (
        Counted(rng.normal(size=(101, dim)).astype(np.float32)),
        Counted(rng.uniform(1, 9, (101, 1)).astype(np.float32)),
    )


def shared_here(cases):
    """For each (rows_per_id, dim, row that is not finite): what this rank gets, and which ids it reads."""
    found = []
    for rows_per_id, dim, bad in cases:
        made, sources = large(rows_per_id, dim)
        if bad is not None:
            sources[0].matrix[bad] = np.nan
        try:
            rows = shared_rows(made, *sources, "user", Exchange.of_default_group())
        except ValueError as error:
            found.append((str(error), None))
        else:
            found.append((rows, [(min(source.read), max(source.read) + 1) for source in sources]))
    return found


def test_ranks_share_the_work_and_get_the_rows_of_one():
    """Each reads its part of the ids. Columns that one rank solves are the same bits; sums over ranks are rounded."""
    # two rows an id: columns for one of the ranks; for both, in two rounds
    cases = [(1, 3, None), (1, 37, None), (2, 3, None), (2, 37, None)]
    bad = [(1, 3, 70), (2, 3, 70)]
    of_ranks = run_on_ranks(shared_here, 2, cases + bad)
    for (rows_per_id, dim, _), *each in zip(cases, *of_ranks, strict=False):
        made, sources = large(rows_per_id, dim)
        alone = shared_rows(made, *sources)
        tolerance = {"rtol": 1e-5, "atol": 1e-6} if rows_per_id == 1 else {"rtol": 0, "atol": 0}
        for (rows, read), ids in zip(each, [(0, 51), (51, 101)], strict=True):
            assert read == [ids, ids]
            torch.testing.assert_close(rows, alone, **tolerance)
    for (first, _), (second, _) in zip(*(found[len(cases) :] for found in of_ranks), strict=True):
        assert "row 70 of the source holds NaN" in second  # which rank 1 reads, and rank 0 does not wait for
        assert first == second


def test_rows_join_the_features_under_their_own_key():
    made = id_map(USERS, 4, 2, weighted=True)
    given = keyed(user=[5, 0, 8], genre=[0, 1, 2])
    found = MappedRows("user", made)(given)
    assert found.keys() == ["user", "genre", "user_rows"]
    assert found["user"].values().tolist() == [5, 0, 8]
    assert found["genre"].values().tolist() == [0, 1, 2]
    assert found["user_rows"].values().tolist() == made.rows[[5, 0, 8]].flatten().tolist()
    assert found["user_rows"].lengths().tolist() == [2, 2, 2]
    assert found["genre"].weights().tolist() == [1, 1, 1]
    assert torch.equal(found["user_rows"].weights(), made.weights[[5, 0, 8]].flatten())


@pytest.mark.parametrize("strategy", ["warm-start", "frozen", "frozen+residual"])
@pytest.mark.parametrize("rows_per_id", [1, 2])
@pytest.mark.parametrize("weighted", [False, True])
def test_towers_start_with_the_scores_of_the_shared_rows(strategy, rows_per_id, weighted):
    user, item = factors()
    made = id_map(USERS, 4, rows_per_id, weighted)
    rng = np.random.default_rng(5)
    counts, rows = rng.uniform(1, 5, (USERS, 1)).astype(np.float32), rng.normal(size=(4, DIM)).astype(np.float32)
    model = build(strategy, counted=True, map=made)
    model.load_counts(np.zeros((USERS, 1), np.float32), np.zeros((ITEMS, 1), np.float32))
    model.load_factors(user, item, counts=(counts, None))
    shared = IdVectors(made, shared_rows(made, user, counts))[:]
    torch.testing.assert_close(scores(model), shared @ torch.from_numpy(item).T)
    model.load_factors(user, item, rows=(rows, None))
    torch.testing.assert_close(scores(model), IdVectors(made, rows)[:] @ torch.from_numpy(item).T)


def test_counts_and_features_of_a_mapped_side_stay_by_id():
    made = IdMap(rows=torch.zeros(USERS, 1, dtype=torch.int32), num_rows=1)
    model = build(counted=True, map=made, categorical={"genre": 3})
    model.load_factors(*factors())
    model.load_counts(np.arange(USERS, dtype=np.float32)[:, None], np.zeros((ITEMS, 1), np.float32))
    found = model.user_frozen(model.user_rows(keyed(user=range(USERS), genre=[0] * USERS)))
    assert found.keys() == ["user_rows"]
    assert len(found["user_rows"].unique(dim=0)) == 1
    counts = model.user_counts(keyed(user=range(USERS), genre=[0] * USERS))
    torch.testing.assert_close(counts, torch.arange(float(USERS))[:, None], rtol=0, atol=(USERS - 1) / 510)
    assert model.table_bytes == {
        "user": 32,
        "user_count": USERS,
        "user_genre": 3 * 16,
        "item": ITEMS * 32,
        "item_count": ITEMS * 16,
    }
    held = sum(collection.storage_bytes() for collection in (model.user_frozen, model.item_frozen))
    assert sum(model.table_bytes.values()) == held + USERS + 3 * 16


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("storage", ["fp32", "int8"])
def test_the_tower_sees_the_counts_by_id(shared, storage):
    """A vector moves with its id's count alone, and by the same on either way that counts are kept."""
    made = IdMap(rows=torch.arange(USERS, dtype=torch.int32)[:, None], num_rows=USERS) if shared else None
    model = build("frozen", "mlp", counted=True, storage=storage, map=made)
    user, item = np.zeros((USERS, 1), np.float32), np.zeros((ITEMS, 1), np.float32)
    user[0] = -1
    model.load_counts(user, item)
    before = model.user_vectors(keyed(user=range(USERS)))
    user[3] = 1
    model.load_counts(user, item)
    moved = (model.user_vectors(keyed(user=range(USERS))) - before).abs().amax(1)
    assert moved.argmax() == 3
    assert float(moved[3]) > 10 * float(moved.sort().values[-2])
    with pytest.raises(ValueError, match="table 'user_count': source has 8 rows, expected 9"):
        model.load_counts(user[:8], item)


@pytest.mark.parametrize("storage", ["fp16", "int8", "int4"])
def test_shared_rows_in_fewer_bits_score_nearly_the_same(storage):
    made = id_map(USERS, 4, 2, weighted=True)
    full, fewer = (scores(build(storage=s, map=made)) for s in ("fp32", storage))
    assert 0 < (fewer - full).abs().max() < {"fp16": 0.002, "int8": 0.02, "int4": 0.2}[storage]


def test_a_compressed_table_is_trained():
    made = id_map(USERS, 4, 2, weighted=True)
    model = build("random", "mlp", map=made)
    weight = dict(model.named_parameters())["user_tables.embedding_bags.user.weight"]
    assert weight.shape == (4, 8)
    model(Rows(model))[0].backward()
    assert (weight.grad != 0).any()


def test_a_map_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="table 'user': its map has 8 ids, expected 9"):
        build(map=id_map(8))
    with pytest.raises(ValueError, match="a feature of the users is named 'user_rows'"):
        build(map=id_map(USERS), categorical={"user_rows": 3})


def test_an_id_beyond_the_map_counts_as_the_rarest():
    spec = SideSpec(key="user", rows=4, dim=DIM, counted=True, map=id_map(4))
    codes = CountCodes(spec)
    codes.load("user_count", torch.tensor([[3.0], [-1.0], [0.5], [1.0]]))
    found = codes(keyed(user=torch.tensor([0, 4, 1, 900])))
    torch.testing.assert_close(found[:, 0], torch.tensor([3.0, -1.0, -1.0, -1.0]))


def test_facts_of_a_part_of_the_rows_stay_small_where_all_rows_have_the_same():
    """All users have 15 rows, and of the half that factors have seen 5 to 10."""
    like = LogCounts(np.full((USERS, 1), 15, np.float32))
    part = LogCounts(np.arange(5, 5 + USERS, dtype=np.float32)[:, None] % 11, share=0.5, like=like)
    assert float(part[0:USERS].abs().max()) < 50
    model = build(counted=True)
    directions = torch.nn.functional.normalize(torch.from_numpy(factors()[0]))
    model.user_tower.fit_scale(directions)
    mean, spread = model.user_tower.length.tolist()
    assert abs(1.1 - mean) / spread < 50


@pytest.mark.parametrize("loss", [LossConfig(kind="bce"), LossConfig(kind="softmax", in_batch=True)])
@pytest.mark.parametrize("kind", ["mlp", "residual"])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("hashed", [False, True])
def test_no_number_is_read_in_forward_and_backward(kind, loss, shared, hashed):
    """On the device "meta" there are none; on CUDA the host would wait for them."""
    network = TwoTowerConfig(
        tables=TablesConfig(strategy="random", dim=8), towers=TowersConfig(kind=kind, hidden=(10,), dim=5), loss=loss
    )
    maps = [id_map(count, rows_per_id=2, weighted=True) if hashed else None for count in (USERS, ITEMS)]
    specs = [SideSpec(key=k, rows=n, map=m) for k, n, m in zip(("user", "item"), (USERS, ITEMS), maps, strict=True)]
    model = TwoTower(network, *specs, tables_device="meta").to("meta")
    for module in model.modules():
        if isinstance(module, LearnedHash):
            module.rows, module.weights = module.rows.to("meta"), module.weights.to("meta")
    model.skip_nonfinite = True
    rows, count = 4, 3 if shared else 12

    def keyed_on_meta(key, size):
        ids, ones = (torch.empty(size, dtype=torch.int64, device="meta") for _ in range(2))
        return KeyedJaggedTensor([key], ids, lengths=ones, stride=size, length_per_key=[size])

    batch = SimpleNamespace(
        user_features=keyed_on_meta("user", rows),
        item_features=keyed_on_meta("item", rows + count),
        label=torch.empty(rows, device="meta"),
        log_q=torch.empty(rows + count, device="meta"),
        excluded=torch.empty(rows, count, dtype=torch.bool, device="meta") if shared else None,
    )
    found, _ = model(batch)
    found.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("strategy", ["random", "frozen", "frozen+residual"])
def test_a_step_on_a_device_is_that_of_a_cpu(strategy, device):
    if strategy == "random":
        model = build(strategy).to(device)
    else:
        tables = TablesConfig(strategy=strategy, dim=8, residual_dim=4)
        network = TwoTowerConfig(tables=tables, towers=TowersConfig(hidden=(10,), dim=5), loss=LossConfig())
        specs = [SideSpec(key=k, rows=n, dim=DIM) for k, n in (("user", USERS), ("item", ITEMS))]
        model = TwoTower(network, *specs, tables_device=device).to(device)
        model.load_factors(*factors())
    batch = Rows(model)
    losses = []
    for where in (device, torch.device("cpu")):
        if where.type == "cpu" and strategy != "random":
            plain = TwoTower(network, *specs)
            plain.load_factors(*factors())
            plain.load_state_dict(model.state_dict(), strict=False)
            model = plain
        model.to(where)
        for name in ("user_features", "item_features", "label", "log_q"):
            setattr(batch, name, getattr(batch, name).to(where))
        losses.append(float(model(batch)[0]))
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
