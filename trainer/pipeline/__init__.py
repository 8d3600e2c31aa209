"""`recpress pipeline`: the stages one after the other."""
