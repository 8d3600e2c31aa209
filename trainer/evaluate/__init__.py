"""`recpress evaluate`: ranks held-out rows over sharded tables."""
