"""Features of a model: which columns of a log they are, and the tables and transforms that make batches of them."""
