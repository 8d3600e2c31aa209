"""CAFE: the sketch by hand, and how ids become hot."""

import torch

from recpress.trainer.compare.click.cafe import DECAY, CafeTable, HotRows


def insert(sketch, keys, scores):
    found, rows = sketch.insert(torch.tensor(keys), torch.tensor(scores))
    return dict(zip(found.tolist(), rows.tolist(), strict=True))


def test_a_known_id_is_hot_from_the_threshold_as_long_as_rows_are_free():
    sketch = HotRows(2, dim=4, threshold=10.0)
    assert insert(sketch, [4, 4, 6], [6.0, 6.0, 3.0]) == {}  # new ids wait for their next access
    assert insert(sketch, [4, 6], [1.0, 8.0]) == {4: 0, 6: 1}
    insert(sketch, [8], [50.0])
    assert insert(sketch, [8], [50.0]) == {}  # both rows are taken
    assert sketch.look_up(torch.tensor([4, 6, 8, 5])).tolist() == [0, 1, -1, -1]


def test_a_new_id_takes_the_place_and_score_of_the_coldest_but_not_of_a_hot_id():
    sketch = HotRows(1, dim=4, threshold=100.0)
    insert(sketch, [0, 1, 2, 3], [4.0, 3.0, 2.0, 5.0])
    insert(sketch, [9], [1.0])
    assert sketch.keys.tolist() == [[0, 1, 9, 3]]
    assert sketch.scores.tolist() == [[4, 3, 3, 5]]
    sketch.hot[0, 1] = 0
    sketch.scores[0, 1] = 0.5
    insert(sketch, [7], [1.0])
    assert sketch.keys.tolist() == [[0, 1, 9, 3]]


def test_scores_decay_and_cold_ids_lose_their_rows():
    sketch = HotRows(2, dim=4, threshold=10.0)
    insert(sketch, [0], [10.0])
    assert insert(sketch, [0], [0.05]) == {0: 0}
    insert(sketch, [1], [1000.0])
    insert(sketch, [3], [1.0])
    assert sketch.look_up(torch.tensor([0])).tolist() == [-1]
    assert sketch.scores[0, 0] == torch.tensor(10.05 * DECAY)


def test_a_hot_id_starts_from_its_shared_row_and_no_longer_trains_it():
    table = CafeTable(HotRows(4, dim=4, threshold=3.0), first=100, rows=2, dim=4)
    shared = table.shared.weight.detach().clone()
    for _ in range(2):
        table(torch.tensor([5, 5, 5, 0])).sum().backward()
        table.after_backward()
    assert table.hot.look_up(torch.tensor([105, 100])).tolist()[1] == -1
    row = int(table.hot.look_up(torch.tensor([105])))
    assert row >= 0
    assert torch.equal(table.hot.rows.weight[row], shared[1])
    table.zero_grad()
    table(torch.tensor([5])).sum().backward()
    assert not table.shared.weight.grad.any()
    assert table.hot.rows.weight.grad[row].tolist() == [1, 1, 1, 1]
