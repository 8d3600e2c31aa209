"""Report pages and results as plain data, for comparisons and benchmarks."""
