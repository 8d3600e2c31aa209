"""`recpress tune`: settings of the factorization and the network, chosen within a budget."""
