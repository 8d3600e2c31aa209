"""Whether a run fits on a cluster, and the smallest cluster."""

from recpress.data.config import NegativesConfig
from recpress.trainer.plan.config import ClusterConfig
from recpress.trainer.plan.job import job_of
from recpress.trainer.plan.memory import peak, rank_lines
from recpress.trainer.plan.meta_model import MetaTowers, shards_by_rank
from recpress.trainer.plan.sizing import MOST_RANKS, assess, smallest
from tests.trainer.plan.jobs import config

GIB = 1 << 30


def test_all_rows_lie_on_some_rank_and_the_heaviest_rank_is_shown():
    job = job_of(config(users=10_000_000))
    model, cluster = MetaTowers(job), ClusterConfig(nodes=2, ranks_per_node=4, memory_gib=8)
    need = assess(job, model, cluster, 0)
    assert need.problem is None
    ranks = shards_by_rank(model, need.layout, cluster.world)
    assert sum(s.nbytes(True) for shards in ranks for s in shards) == 10_100_000 * (512 + 16)
    options = {"world": 8, "cuda": True, "context": int(cluster.context_gib * GIB), "activations": 0}
    assert need.rank_bytes("device") == max(peak(rank_lines(job, model, s, **options), "device") for s in ranks)


def test_no_number_of_ranks_helps_where_a_replicated_part_is_too_large():
    job = job_of(
        config(rows=20_000_000_000, negatives=NegativesConfig(reject_positives="yes"))
    )  # 160 GB of pairs on each rank
    model = MetaTowers(job)
    found = smallest(job, model, ClusterConfig(), 0)
    assert found.ranks is None
    assert "a rank needs" in found.why


def test_the_smallest_cluster_fits_and_a_smaller_one_does_not():
    job = job_of(config(users=600_000_000))  # 307 GB: 56 GiB of tables a GPU at most
    model = MetaTowers(job)
    found = smallest(job, model, ClusterConfig(ranks_per_node=8), 0)
    assert found.checked
    assert found.ranks == 6
    fewer = ClusterConfig(ranks_per_node=found.ranks - 1)
    assert assess(job, model, fewer, 0).problem is not None
    assert found.ranks < MOST_RANKS
