"""How the maps of `LearnedHash` are stored."""

from __future__ import annotations

import pytest
import torch

from recpress.modules.hashing.id_map import IdMap
from recpress.modules.hashing.map_buffers import BatchLayout, MapSlot, pack, unpack
from tests.modules.hashing.keyed_cases import id_map


def slot_of(one: IdMap, start: int) -> MapSlot:
    return MapSlot(one.num_ids, one.num_rows, one.rows_per_id, one.seed, start, one.bits, -1)


@pytest.mark.parametrize("sizes", [[(7, 2)], [(100, 3), (33, 2**17), (1, 1)], [(40, 2**31 - 1), (5, 6)]])
def test_packed_numbers_are_the_rows(sizes: list[tuple[int, int]]) -> None:
    slots, start = {}, 0
    for number, (ids, rows) in enumerate(sizes):
        one = id_map(ids, rows, rows_per_id=1 + number % 2, seed=number)
        slots[one] = slot_of(one, start)
        start += one.rows.numel() * one.bits
    words = pack(slots)
    assert words.numel() == -(-start // 32) + 1
    for one, slot in slots.items():
        bit = slot.start + slot.bits * torch.arange(one.rows.numel())
        assert torch.equal(unpack(words, bit, torch.tensor((1 << slot.bits) - 1)), one.rows.reshape(-1).long())


def test_a_layout_splits_keys_into_runs_of_ascending_maps() -> None:
    first, second = slot_of(id_map(10, 4), 0), slot_of(id_map(20, 7, rows_per_id=2), 10)
    layout = BatchLayout(["x", "a", "b", "y", "a2"], {"a": first, "b": second, "a2": first}, packed=False)
    assert layout.rows_per_id == [1, 1, 2, 1, 1]
    assert layout.positions == [1, 2, 4]
    assert [end for end, _ in layout.runs] == [4, 5]  # the map of `a` begins a new run
    assert [starts.tolist() for _, starts in layout.runs] == [[0, 0, 10, 50, 50], [0, 10]]
    ids = torch.tensor([5, 6, 7, 8, 9])
    assert layout.entries(ids, [1, 1, 1, 1, 1]).tolist() == [5, 6, 14, 15, 8, 9]
    assert layout.repeat(ids, [1, 1, 1, 1, 1]).tolist() == [5, 6, 7, 7, 8, 9]
    numbers = layout.numbers([1, 2, 1, 1, 0], ids.device)
    assert numbers[0].tolist() == [-1, 0, 0, 10, 10, -1]  # starts
    assert numbers[2].tolist() == [0, 0, 0, 0, 1, 0]  # places among the entries of an id
    assert layout.key_rows_per_id(ids.device).tolist() == [[1, 1, 2, 1, 1]]
