"""`recpress bench`: the benchmarks there are, their runs and the page of what they found."""
