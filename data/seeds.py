"""Random numbers that belong to a place."""

import numpy as np
from recpress.data.sampling import philox


def generator(*place: int | str) -> np.random.Generator:
    """A generator of its own for each place (a seed, a use, a row group ...)."""
    return np.random.Generator(philox(*place))
