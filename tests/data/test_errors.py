"""The error for invalid input."""

import pickle

import pytest

from recpress.data.errors import InputError


def test_it_is_a_value_error_and_crosses_processes():
    error = pickle.loads(pickle.dumps(InputError("a.parquet, row 3: null; expected integers")))
    assert type(error) is InputError
    assert str(error) == "a.parquet, row 3: null; expected integers"
    with pytest.raises(ValueError, match="row 3"):
        raise error
