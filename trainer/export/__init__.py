"""`recpress export`: programs, vocabularies, item vectors and an index, for serving without recpress."""
