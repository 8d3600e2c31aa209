"""The summary of a pipeline."""

from recpress.trainer.pipeline.summary import as_table, below_popularity


def test_a_model_below_popularity_is_named():
    def made(hr, ndcg):
        return {"metrics": {"HR@10": hr, "NDCG@10": ndcg, "cases": 9.0}, "rows": 1, "seconds": 1.0}

    popular = made(0.3, 0.2)
    assert "HR@10 0.1000 against 0.3000" in below_popularity({"popularity": popular, "network": made(0.1, 0.1)})
    assert below_popularity({"popularity": popular, "factorization": made(0.3, 0.2)}) is not None
    assert below_popularity({"popularity": popular, "network": made(0.2, 0.21)}) is None
    assert below_popularity({"popularity": popular}) is None


def test_a_network_that_fell_back_is_said_to_be_the_factorization():
    made = {"metrics": {"HR@10": 0.5}, "rows": 1, "seconds": 1.0}
    assert "own ranking" in as_table({"network": {**made, "fallback": True}})
    assert "own ranking" not in as_table({"network": {**made, "fallback": False}})
