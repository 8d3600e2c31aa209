"""`recpress train`: the two-tower network on a sampled stream, or on a log that grows."""
