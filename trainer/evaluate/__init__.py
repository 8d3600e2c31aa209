"""`recpress evaluate`: held-out rows, ranked over sharded tables."""
