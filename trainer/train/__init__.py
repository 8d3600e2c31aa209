"""`recpress train`: trains the two-tower network on a sampled stream, or online on a growing log."""
