"""`recpress factorize`: log -> factors, by ALS or as a logistic model."""
