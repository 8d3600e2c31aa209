"""Other formats into a log: text, JSON lines and Parquet files, vocabularies, and the split into parts."""
