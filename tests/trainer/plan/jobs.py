"""Options and figures that the tests of the plan share."""

from recpress.modules.config import TablesConfig, TwoTowerConfig
from recpress.trainer.plan.config import PlanConfig


def config(users=1_000_000, items=100_000, strategy="frozen", storage="fp32", **changes):
    tables = TablesConfig(strategy=strategy, storage=storage, dim=128)
    return PlanConfig(users=users, items=items, dim=128, model=TwoTowerConfig(tables=tables), **changes)


def line(lines, name):
    (found,) = (entry["bytes"] for entry in lines if entry["name"] == name)
    return found
