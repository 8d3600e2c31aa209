"""Invalid clusters and jobs."""

import pytest

from recpress.data.errors import InputError
from recpress.trainer.plan.config import ClusterConfig, PlanConfig


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"nodes": 0}, "nodes is 0"),
        ({"ranks_per_node": -1}, "ranks_per_node is -1"),
        ({"memory_gib": 0.0}, "cluster.memory_gib is 0.0"),
        ({"host_memory_gib": float("nan")}, "cluster.host_memory_gib is nan"),
        ({"inter_gb_s": -2.0}, "cluster.inter_gb_s is -2.0"),
    ],
)
def test_clusters_that_cannot_be_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        ClusterConfig(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "--users and --items"),
        ({"users": 5, "items": 5, "data": "x"}, "users: set together with data"),
        ({"users": 5, "items": 5, "factors": "x"}, "expected data"),
        ({"users": 5, "items": 5, "share": 0.0}, "share is 0"),
        ({"users": 5, "items": 5, "user_features": ("age",)}, "expected data"),
    ],
)
def test_jobs_that_cannot_be_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        PlanConfig(**changes)
