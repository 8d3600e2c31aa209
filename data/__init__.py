"""The log: schema, Parquet stream, sampling, negatives, vocabularies, counts, converters, the made log."""
