"""The two-tower network: towers, losses, ranking metrics, logistic factorization."""
