"""A log on disk: schema, Parquet splits, columns, filesystems, and artifacts with manifests.

May import `data.config`, `data.errors` and `data.seeds` only.
"""
