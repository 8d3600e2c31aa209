"""`recpress plan`: sharding plan and memory for a cluster that need not exist."""
