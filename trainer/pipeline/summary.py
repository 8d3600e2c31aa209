"""The summary of a pipeline: popularity, the factorization and the network on the held-out rows."""

from __future__ import annotations

from typing import Any

import torch

from recpress.data.dataset import artifact
from recpress.data.dataset.log import Log
from recpress.trainer.artifacts.factors import FACTORS, MODEL, open_factors
from recpress.trainer.distributed.heartbeat import activity
from recpress.trainer.distributed.process_group import Ranks
from recpress.trainer.distributed.rank_errors import raise_on_all_ranks
from recpress.trainer.evaluate.config import EvaluateConfig
from recpress.trainer.evaluate.ranking import vectors_from_factors
from recpress.trainer.evaluate.stage import evaluate, load_heldout, rank_heldout
from recpress.trainer.model.vectors import VectorFn


def summarize(
    log: Log, config: EvaluateConfig, factors: str | None, model: str | None, ranks: Ranks
) -> dict[str, dict[str, Any]]:
    """Method -> its `metrics`, number of `rows` read and `seconds`. Collective; the same on every rank.

    Args:
        config: of the evaluation; its model is ranked last.
        factors, model: folders of the artifacts, if the pipeline made them.
    """
    methods: dict[str, dict[str, Any]] = {}
    heldout = load_heldout(log, config.evaluation)

    def rank(user: VectorFn, item: VectorFn) -> dict[str, float]:
        return rank_heldout(heldout, user, item, config.evaluation, ranks.device)

    with raise_on_all_ranks(), activity("counting items"):
        counts = torch.from_numpy(log.counts("item")).float()[:, None]
    metrics = rank(vectors_from_factors(torch.ones(log.num_users, 1)), vectors_from_factors(counts))
    methods["popularity"] = {"metrics": metrics, "rows": log.train.num_rows, "seconds": None}
    if factors is not None:
        with raise_on_all_ranks():
            opened = open_factors(factors, log)
            user, item = (vectors_from_factors(opened.table(side)) for side in ("user", "item"))
        spent = opened.manifest["seconds"]
        methods["factorization"] = {
            "metrics": rank(user, item),
            "rows": log.train.num_rows,
            "seconds": spent["seconds"] + spent["crossfit_seconds"],
        }
    if model is not None:
        manifest = artifact.read_manifest(model, MODEL)
        spent = manifest["seconds"]
        methods["network"] = {
            "metrics": evaluate(EvaluateConfig(**{**vars(config), "out": None})),
            "rows": manifest["rows"],
            "seconds": spent["setup"] + spent["train"],
            "fallback": bool(manifest.get("fallback")),
            "steps": manifest["steps"],
            "hashed": bool(manifest["model"].get("maps")),
        }
    elif factors != config.model:  # an artifact from elsewhere
        kind = str(artifact.read_manifest(config.model).get("kind"))
        name = {FACTORS: "factorization", MODEL: "network"}.get(kind, kind)
        made = evaluate(EvaluateConfig(**{**vars(config), "out": None}))
        methods[name] = {"metrics": made, "rows": None, "seconds": None}
    return methods


def as_table(methods: dict[str, dict[str, Any]]) -> str:
    """One line per method: its metrics, rows read, seconds."""
    first = next(iter(methods.values()))["metrics"]
    names = [name for name in first if not name.islower() and name not in ("MRR", "AUC")]
    heads = [f"  {name:>10}" for name in [*names, "rows read", "seconds"]]
    lines = [f"{'':14}" + "".join(heads)]
    for method, made in methods.items():
        values = [f"{made['metrics'].get(name, float('nan')):.4f}" for name in names]
        rows = "-" if made["rows"] is None else f"{made['rows']:,}"
        seconds = "-" if made["seconds"] is None else f"{made['seconds']:.1f}"
        cells = zip([*values, rows, seconds], heads, strict=True)
        lines.append(f"{method:14}" + "".join(f"{value:>{len(head)}}" for value, head in cells))
    network = methods.get("network", {})
    if network.get("fallback"):
        start = "the factorization's own ranking"
        if network.get("hashed"):
            start = "the ranking of the factors in shared rows"
        why = "which no epoch improved on validation rows" if network.get("steps", 1) else "as no network was trained"
        lines.append(f"network: {start}, {why}")
    return "\n".join(lines)


def below_popularity(methods: dict[str, dict[str, Any]]) -> str | None:
    """A warning where the last method is above popularity on no metric of the table; else None."""
    name, made = list(methods.items())[-1]
    popular = methods["popularity"]["metrics"]
    compared = [key for key in popular if key.startswith(("HR@", "NDCG@")) and key in made["metrics"]]
    if name == "popularity" or not compared or any(made["metrics"][key] > popular[key] for key in compared):
        return None
    values = ", ".join(f"{key} {made['metrics'][key]:.4f} against {popular[key]:.4f}" for key in compared)
    return (
        f"the {name} ranks the held-out rows no better than popularity ({values}): the log has too little "
        "information about tastes, or its held-out rows differ from its train rows (new ids, another time); rank by "
        "popularity, or check how the rows were held out"
    )
