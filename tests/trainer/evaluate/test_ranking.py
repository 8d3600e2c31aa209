import math
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from recpress.data.dataset.columns import Jagged
from recpress.data.dataset.log import open_log
from recpress.data.errors import InputError
from recpress.modules.als.factors import RowBlocks
from recpress.trainer.distributed.collectives import all_gather, all_reduce, rank_and_world
from recpress.trainer.evaluate import heldout as ho
from recpress.trainer.evaluate.ranking import ItemShard, evaluate_full, evaluate_sampled, vectors_from_factors
from tests.fake_cuda import CUDA, cuda_ids, fake_cuda
from tests.ranks import run_on_ranks

DATA = Path(os.environ.get("RECPRESS_DATA", Path(__file__).parents[3] / ".." / "shared" / "data"))


def one_user_scores(scores):
    """A user vector (1,) and item vectors whose scores for it are the given ones."""
    return vectors_from_factors(np.ones((9, 1))), vectors_from_factors(np.array(scores, dtype=np.float32)[:, None])


def pairs(*values):
    users, items = zip(*values, strict=True) if values else ((), ())
    return np.array(users, dtype=np.int64), np.array(items, dtype=np.int32)


def test_sampled_known_answer():
    # Scores are the item ids, and item 6 scores as item 5 does.
    user, item = one_user_scores([0, 1, 2, 3, 4, 5, 5])
    heldout = ho.sampled_from_arrays(
        np.array([2, 0, 1]),
        np.array([5, 4, 0]),
        # User 2: item 5 is tied with 6, and its own id among its negatives is dropped.
        Jagged(np.array([5, 6, 1, 0, 5, 6, 3, 1, 2]), np.array([0, 4, 7, 9])),
        num_users=4,
        num_items=7,
        chunk=2,
    )
    result = evaluate_sampled(heldout, user, item, ks=(1, 2), item_chunk=3)
    # Positions: user 0: 3 of 3 + 1, user 1: 3 of 2 + 1, user 2: 2 of 3 + 1.
    assert result == pytest.approx(
        {
            "HR@1": 0,
            "HR@2": 1 / 3,
            "Recall@1": 0,
            "UncappedRecall@1": 0,
            "Recall@2": 1 / 3,
            "UncappedRecall@2": 1 / 3,
            "NDCG@1": 0,
            "NDCG@2": 1 / math.log2(3) / 3,
            "MRR": (1 / 3 + 1 / 3 + 1 / 2) / 3,
            "AUC": (1 / 3 + 0 + 2 / 3) / 3,
            "cases": 3,
            "users_skipped": 1,
            "negatives_dropped": 1,
        },
        abs=1e-9,
    )


def test_full_known_answer():
    user, item = one_user_scores([0, 1, 2, 3, 4, 5, 6])
    heldout = ho.full_from_pairs(
        # User 0 has seen 6 and 5 and holds out 4 and 1, of which nothing and {2, 3} are ahead.
        # User 1 has seen nothing and holds out 5, behind 6. User 2 holds out only what it has seen.
        pairs((1, 5), (0, 4), (0, 1), (2, 3), (1, 5)),
        pairs((0, 6), (0, 5), (2, 3), (3, 0), (0, 6)),
        num_users=4,
        num_items=7,
        chunk=1,
    )
    result = evaluate_full(heldout, user, item, ks=(2, 4), item_chunk=2)
    assert result == pytest.approx(
        {
            "HR@2": 1,
            "Recall@2": (1 / 2 + 1) / 2,
            "UncappedRecall@2": (1 / 2 + 1) / 2,
            "NDCG@2": (1 / (1 + 1 / math.log2(3)) + 1 / math.log2(3)) / 2,
            "HR@4": 1,
            "Recall@4": 1,
            "UncappedRecall@4": 1,
            "NDCG@4": ((1 + 1 / math.log2(5)) / (1 + 1 / math.log2(3)) + 1 / math.log2(3)) / 2,
            "MRR": (1 + 1 / 2) / 2,
            "AUC": ((3 / 3 + 1 / 3) / 2 + 5 / 6) / 2,  # user 0's competitors: 0, 2, 3
            "cases": 2,
            "users_skipped": 2,
            "users_without_train": 1,
            "heldout_repeated": 1,
            "heldout_seen": 1,
        },
        abs=1e-9,
    )


def test_a_user_without_competitors_has_no_auc_and_hits():
    user, item = one_user_scores([0, 1])
    heldout = ho.full_from_pairs(pairs((0, 0)), pairs((0, 1)), num_users=1, num_items=2)
    result = evaluate_full(heldout, user, item)
    assert result["HR@10"] == 1
    assert math.isnan(result["AUC"])


def made_log(seed, users=37, items=53, dim=4, ties=True):
    """Held-out pairs, seen pairs and vectors; small integers make many ties."""
    rng = np.random.default_rng(seed)
    seen = rng.random((users, items)) < 0.2
    heldout = rng.random((users, items)) < 0.1
    draw = (lambda n: rng.integers(-2, 3, (n, dim))) if ties else (lambda n: rng.normal(size=(n, dim)))
    return (
        np.nonzero(heldout),
        np.nonzero(seen),
        draw(users).astype(np.float32),
        draw(items).astype(np.float32),
    )


def plain_full(heldout, seen, users, items, k):
    """All metrics by sorting one user after the other."""
    found = []
    for user in range(len(users)):
        masked = set(seen[1][seen[0] == user])
        own = set(heldout[1][heldout[0] == user]) - masked
        if not own:
            continue
        scores = users[user].astype(np.float64) @ items.T.astype(np.float64)
        ranking = sorted(set(range(len(items))) - masked, key=lambda item: (-scores[item], item in own))
        places = [place for place, item in enumerate(ranking, start=1) if item in own]
        hits = [place for place in places if place <= k]
        ideal = sum(1 / math.log2(place + 1) for place in range(1, min(k, len(own)) + 1))
        others = [item for item in ranking if item not in own]
        below = [sum(scores[other] < scores[item] for other in others) / len(others) for item in own]
        found.append(
            (
                bool(hits),
                sum(1 / math.log2(place + 1) for place in hits) / ideal,
                len(hits) / min(k, len(own)),
                len(hits) / len(own),
                1 / places[0],
                np.mean(below),
            )
        )
    names = (f"HR@{k}", f"NDCG@{k}", f"Recall@{k}", f"UncappedRecall@{k}", "MRR", "AUC")
    return dict(zip(names, np.mean(found, axis=0), strict=True))


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 2**32 - 1), st.integers(1, 40), st.integers(1, 60), st.booleans())
def test_full_agrees_with_sorting_for_any_chunks(seed, chunk, item_chunk, ties):
    heldout, seen, users, items = made_log(seed, ties=ties)
    prepared = ho.full_from_pairs(heldout, seen, num_users=37, num_items=53, chunk=chunk)
    result = evaluate_full(
        prepared, vectors_from_factors(users), vectors_from_factors(items), (5,), item_chunk=item_chunk
    )
    for name, value in plain_full(heldout, seen, users, items, 5).items():
        assert result[name] == pytest.approx(value, abs=1e-9), name


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 2**32 - 1), st.integers(1, 40), st.integers(1, 60))
def test_sampled_agrees_with_counting_in_any_order(seed, chunk, item_chunk):
    rng = np.random.default_rng(seed)
    _, _, users, items = made_log(seed)
    who, what = rng.integers(0, 37, 30), rng.integers(0, 53, 30)
    negatives = rng.integers(0, 53, (30, 12))
    negatives[:, 0] = (what + 1) % 53
    scores = users @ items.T
    ahead = ((scores[who[:, None], negatives] >= scores[who, what][:, None]) & (negatives != what[:, None])).sum(1)
    order = rng.permutation(30)
    prepared = ho.sampled_from_arrays(
        who[order], what[order], negatives[order], num_users=37, num_items=53, chunk=chunk
    )
    result = evaluate_sampled(
        prepared, vectors_from_factors(users), vectors_from_factors(items), (3,), item_chunk=item_chunk
    )
    assert result["HR@3"] == pytest.approx(np.mean(ahead < 3), abs=1e-9)
    assert result["MRR"] == pytest.approx(np.mean(1 / (ahead + 1)), abs=1e-9)
    assert result["AUC"] == pytest.approx(np.mean(1 - ahead / (negatives != what[:, None]).sum(1)), abs=1e-9)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 2**32 - 1), st.booleans(), st.booleans())
def test_scores_in_float32_give_the_same_counts(seed, ties, close):
    """As on a GPU: float32 decides, except where a score is so close to the target's that float64 must."""
    heldout, seen, users, items = made_log(seed, ties=ties)
    if close:  # many scores that differ in the last bits only
        items = (items[:1] * (1 + 1e-7 * np.arange(len(items)))[:, None]).astype(np.float32)
    prepared = ho.full_from_pairs(heldout, seen, num_users=37, num_items=53, chunk=11)
    arguments = (prepared, vectors_from_factors(users), vectors_from_factors(items), (5,))
    want_cases, found_cases = {}, {}
    want = evaluate_full(*arguments, item_chunk=20, per_case=want_cases)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("recpress.trainer.evaluate.ranking.in_float64", lambda device: False)
        patch.setattr("recpress.trainer.evaluate.ranking._PAIRS_ON_DEVICE", 7)
        found = evaluate_full(*arguments, item_chunk=20, per_case=found_cases)
    assert found == want
    assert all(torch.equal(found_cases[name], want_cases[name]) for name in want_cases)


@pytest.mark.parametrize("full", [False, True])
def test_metrics_are_those_of_a_cpu(device, full):
    heldout, seen, users, items = made_log(3, ties=True)
    if full:
        prepared, evaluate = ho.full_from_pairs(heldout, seen, num_users=37, num_items=53, chunk=11), evaluate_full
    else:
        rng = np.random.default_rng(0)
        negatives = rng.integers(0, 53, (len(heldout[0]), 12))
        prepared = ho.sampled_from_arrays(*heldout, negatives, num_users=37, num_items=53, chunk=11)
        evaluate = evaluate_sampled
    want = evaluate(prepared, vectors_from_factors(users), vectors_from_factors(items), (5,), item_chunk=20)
    on_device = [torch.from_numpy(table).to(device) for table in (users, items)]
    found = evaluate(prepared, *map(vectors_from_factors, on_device), (5,), item_chunk=20, device=device)
    assert found == want


def test_on_cuda_scores_do_not_mix_devices(monkeypatch):
    """Evaluation may wait for the device, as here for the number of scores that float64 decides."""
    monkeypatch.setattr("recpress.trainer.evaluate.ranking._PAIRS_ON_DEVICE", 4)
    with fake_cuda():
        monkeypatch.setattr(torch.Tensor, "nonzero", lambda tensor, as_tuple: (cuda_ids(9), cuda_ids(9)))
        items = object.__new__(ItemShard)
        items.vectors, items.start, items.stop, items.chunk = torch.empty(60, 8, device=CUDA), 0, 53, 20
        users = torch.empty(5, 8, device=CUDA)
        rows, wanted = np.array([0, 0, 3]), np.array([52, 3, 9])
        mine, scores = items.pair_scores(users, rows, wanted)
        assert len(mine) == len(scores) == 3
        found = items.count_ahead(users, rows, scores, np.array([1, 4]), np.array([50, 2]))
        assert (found.device, found.dtype, len(found)) == (CUDA, torch.int64, 3)


def sharded_lookup(block, num_rows):
    """Rows of a table that is sharded over the ranks by `RowBlocks`. Collective."""
    rank, world = rank_and_world()
    start = RowBlocks(num_rows, world).start(rank)

    def lookup(ids):
        wanted = torch.stack(all_gather(ids))  # (world, B)
        found = block.new_zeros(*wanted.shape, block.shape[1])
        mine = (wanted >= start) & (wanted < start + len(block))
        found[mine] = block[wanted[mine] - start]
        return all_reduce(found)[rank]

    return lookup


def evaluate_on_this_rank(folder):
    """Both protocols from a log in files, with towers on sharded tables: lookups are collective."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    log = open_log(folder)
    _, _, users, items = made_log(3, ties=False)
    torch.manual_seed(0)
    tower = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
    lookups = []
    for table in (users, items):
        blocks = RowBlocks(len(table), world)
        block = torch.from_numpy(table[blocks.start(rank) : blocks.stop(rank)])
        lookups.append(sharded_lookup(block, len(table)))
    user_vectors, item_vectors = ((lambda ids, look=look: tower(look(ids))) for look in lookups)
    full = evaluate_full(ho.full_from_log(log, chunk=4), user_vectors, item_vectors, (1, 5), item_chunk=8)
    sampled = evaluate_sampled(ho.sampled_from_log(log, chunk=4), user_vectors, item_vectors, (1, 5), item_chunk=8)
    return full, sampled


def write_log(folder, seed=3):
    heldout, seen, *_ = made_log(seed)
    for name, (users, items) in (("train", seen), ("test", heldout)):
        table = pa.table({"user_id": users, "item_id": items})
        pq.write_table(table, folder / f"{name}.parquet", row_group_size=20)
    rng = np.random.default_rng(seed)
    first = np.unique(heldout[0], return_index=True)[1]
    lists = [rng.integers(0, 53, rng.integers(5, 20)) for _ in first]
    columns = {"user_id": heldout[0][first], "pos_item_id": heldout[1][first], "negatives": lists}
    pq.write_table(pa.table(columns), folder / "test_negatives.parquet", row_group_size=7)


def test_any_number_of_ranks_gives_the_same_numbers(tmp_path):
    write_log(tmp_path)
    alone = evaluate_on_this_rank(tmp_path)
    assert alone[0]["cases"] > 30
    assert 0 < alone[0]["HR@5"] < 1
    for world in (2, 3):
        assert run_on_ranks(evaluate_on_this_rank, world, tmp_path) == [alone] * world


BAD = {
    "vocabulary": "held-out user 37: outside the vocabulary; expected 0 to 36",
    "user": "user 6: its scores are not finite, because its vector is not finite",
    "item": "item 50: its vector is not finite",
    "overflow": "user 7: its scores are not finite, because its vector is too large",
}


def messages_of_bad_values():
    rank = dist.get_rank()
    messages = {}
    for what in BAD:
        heldout, seen, users, items = made_log(0)
        if what == "vocabulary" and rank == 1:
            heldout = (np.minimum(heldout[0] + 5, 37), heldout[1])
        if what == "user":
            users[6] = math.nan
        if what == "item" and rank == 1:  # the rank that keeps this item's chunk
            items[50] = math.inf
        if what == "overflow":
            users[7] = items[9] = 1e30
        try:
            prepared = ho.full_from_pairs(heldout, seen, num_users=37, num_items=53, chunk=4)
            evaluate_full(prepared, vectors_from_factors(users), vectors_from_factors(items), item_chunk=8)
        except InputError as error:
            messages[what] = str(error)
    return messages


def test_bad_values_give_one_error_on_every_rank():
    assert run_on_ranks(messages_of_bad_values, 2) == [BAD, BAD]


def test_what_cannot_be_ranked_is_refused():
    nothing = ho.full_from_pairs(pairs(), pairs((0, 1)), num_users=3, num_items=9)
    with pytest.raises(InputError, match="nothing is held out"):
        evaluate_full(nothing, *one_user_scores(range(9)))
    one = ho.full_from_pairs(pairs((0, 1)), pairs(), num_users=3, num_items=9, chunk=4)
    with pytest.raises(ValueError, match=r"user vectors \(4, 2\); expected \(4, 1\)"):
        evaluate_full(one, vectors_from_factors(np.ones((3, 2))), one_user_scores(range(9))[1])


def test_popularity_on_movielens():
    folder = DATA / "ml-1m-ncf"
    if not folder.exists():
        pytest.skip(f"no {folder}")
    log = open_log(folder)
    counts = log.counts("item").astype(np.float32)
    user = vectors_from_factors(np.ones((log.num_users, 1), dtype=np.float32))
    result = evaluate_sampled(ho.sampled_from_log(log), user, vectors_from_factors(counts[:, None]))
    assert result["negatives_dropped"] == 156
    # Ties against the model. Ties in its favour give the 0.4538 / 0.2545 that is often quoted.
    assert result["HR@10"] == pytest.approx(0.45315, abs=1e-5)
    assert result["NDCG@10"] == pytest.approx(0.25409, abs=1e-5)
    table = pq.read_table(folder / "test_negatives.parquet")
    target = counts[table["pos_item_id"].to_numpy()]
    ahead = (counts[np.array(table["negatives"].to_pylist())] > target[:, None]).sum(1)
    assert np.mean(ahead < 10) == pytest.approx(0.4538, abs=5e-5)
    assert np.mean(np.where(ahead < 10, 1 / np.log2(ahead + 2), 0)) == pytest.approx(0.2545, abs=5e-5)
