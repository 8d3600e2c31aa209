"""`recpress recommend`: the best items of each user, exact, as Parquet with raw ids."""
