"""Random numbers as functions of what they are for."""

import numpy as np

from recpress.data.seeds import generator, key


def test_keys_depend_on_every_part_and_not_on_its_integer_type():
    assert key("a", 3) == key("a", np.int64(3))
    assert len({key("a", 3), key("a", 4), key("b", 3), key("a", "3"), key(3, "a")}) == 5
    assert generator(1, "x").integers(1 << 60) == generator(1, "x").integers(1 << 60)
