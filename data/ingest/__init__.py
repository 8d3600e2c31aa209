"""Convert other formats to a log: text, JSON lines and Parquet files, vocabularies, and the split into train and test.

May import every other subpackage of `data` except `synthetic`.
"""
