"""The two-tower network: towers, losses, ranking metrics, logistic factorization."""

from recpress.modules.two_tower.model import SideSpec, TwoTower

__all__ = ["SideSpec", "TwoTower"]
