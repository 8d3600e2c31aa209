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
    assert "no epoch improved" in as_table({"network": {**made, "fallback": True, "steps": 3}})
    untrained = as_table({"network": {**made, "fallback": True, "steps": 0}})
    assert "no network was trained" in untrained
    assert "no epoch improved" not in untrained
    assert "own ranking" not in as_table({"network": {**made, "fallback": False}})


def test_columns_of_long_names_stay_apart():
    made = {"rows": 10, "seconds": 1.0, "metrics": {"Recall@20": 0.5, "UncappedRecall@20": 0.25}}
    head, values = as_table({"popularity": made}).splitlines()
    assert head.split()[:2] == ["Recall@20", "UncappedRecall@20"]
    assert head.index("UncappedRecall@20") + len("UncappedRecall@20") == values.index("0.2500") + len("0.2500")
