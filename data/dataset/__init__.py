"""A log on disk: schema, Parquet splits, columns, filesystems, and artifacts with manifests."""
