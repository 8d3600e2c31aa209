"""Sizes and tables of the methods for click models."""

import pytest
import torch
from torchrec import EmbeddingBagConfig

from recpress.trainer.compare.click.methods import NAMES, ClickSetting, Compressor, Full, axes
from recpress.trainer.compare.config import CLICK_METHODS

IDS = {"user": 400, "item": 200, "kind": 3}


@pytest.fixture(scope="module")
def compressor():
    configs = [
        EmbeddingBagConfig(name=name, num_embeddings=ids, embedding_dim=8, feature_names=[name])
        for name, ids in IDS.items()
    ]
    counts = {name: torch.arange(ids) % 7 + 1 for name, ids in IDS.items()}
    return Compressor(configs, counts, [], epochs=4)


@pytest.fixture(scope="module")
def full():
    random = torch.Generator().manual_seed(0)
    weights = {name: torch.randn(ids, 8, generator=random) for name, ids in IDS.items()}
    return Full(weights, weights)


def setting(method, **more):
    return ClickSetting(method=method, **{axis: values[0] for axis, values in axes(method).items()} | more)


@pytest.mark.parametrize("method", CLICK_METHODS)
def test_tables_hold_the_rows_of_the_budget_and_no_more(compressor, full, method):
    rows = compressor.rows(setting(method), full, 150, seed=0)
    assert sum(rows) == 150
    tables = compressor.make(setting(method), rows, full, seed=0)
    numbers = sum(parameter.numel() for parameter in tables.parameters())
    assert numbers <= 150 * 8
    assert numbers >= 145 * 8  # halves and products of whole numbers may leave some
    size = compressor.size(setting(method), rows)
    assert (size.rows, size.row_bytes) == (150, 150 * 8 * 4)
    assert (size.map_bytes == 0) == (method in ("universal", "double", "quotient-remainder", "robe"))


def test_what_finds_the_rows_by_hand(compressor):
    rows = [90, 57, 3]  # the table `kind` is full

    def bytes_of(method, **more):
        return compressor.size(setting(method, **more), rows).map_bytes

    assert bytes_of("learned") == 400 * 7 // 8 + 200 * 6 // 8
    assert bytes_of("learned-2") == 2 * bytes_of("learned")
    assert bytes_of("learned-2", weighted=True) == 400 * (14 + 32) // 8 + 200 * (12 + 32) // 8
    assert bytes_of("frequency", exclusive_share=0.5) == -(-45 * 9 // 8) + 28 * 8 // 8
    assert bytes_of("cce", chunks=2) == 400 * 2 * 6 // 8 + 200 * 2 * 5 // 8
    assert bytes_of("cafe", shared=0.5) == 48 * (45 + 29)
    assert compressor.size(setting("learned"), rows).serving_map_bytes == 4 * 600


@pytest.mark.parametrize("method", CLICK_METHODS)
def test_the_most_rows_within_the_bytes(compressor, full, method):
    limit = 150 * 8 * 4
    if method == "learned-2":
        limit *= 2
    rows = compressor.rows_within_bytes(setting(method), full, limit, seed=0)
    assert 0.85 * limit <= compressor.size(setting(method), rows).bytes <= limit
    if axes(method).get("split", ("cap",))[0] == "distortion":  # not one number, but the split, is chosen
        return
    more = compressor.rows(setting(method), full, sum(rows) + 1, seed=0)
    assert compressor.size(setting(method), more).bytes > limit


@pytest.mark.parametrize("method", ["learned-2", "cce"])
def test_a_budget_that_the_map_alone_exceeds_is_refused(compressor, full, method):
    with pytest.raises(ValueError, match="does not fit"):
        compressor.rows_within_bytes(setting(method), full, 100, seed=0)


def test_learned_rows_start_from_the_full_tables(compressor, full):
    exact = compressor.make(setting("learned"), [400, 200, 3], full, seed=0)
    ids = torch.arange(200)
    assert torch.equal(exact.tables[1](ids), full.weights["item"])
    shared = compressor.make(setting("learned"), [400, 20, 3], full, seed=0).tables[1]
    error = (shared(ids) - full.weights["item"]).square().mean()
    random = compressor.make(setting("learned", start="random"), [400, 20, 3], full, seed=0).tables[1]
    assert error < 0.8 < (random(ids) - full.weights["item"]).square().mean()


def test_every_method_has_a_name():
    assert set(CLICK_METHODS) == set(NAMES)
