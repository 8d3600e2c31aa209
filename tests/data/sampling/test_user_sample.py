"""Samples that are stratified by user."""

import numpy as np

from recpress.data.sampling.user_sample import Marker


def test_each_user_gives_its_share_whatever_the_calls():
    users = np.random.default_rng(0).integers(0, 50, 5000)
    marks = Marker(0.3, seed=1).mark(users)
    counts = np.bincount(users)
    members = np.bincount(users[marks], minlength=50)
    assert np.all((members == np.floor(0.3 * counts)) | (members == np.ceil(0.3 * counts)))
    marker = Marker(0.3, seed=1)
    assert np.array_equal(np.concatenate([marker.mark(part) for part in np.array_split(users, 7)]), marks)
