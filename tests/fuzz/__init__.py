"""Programs that look for inputs that break a reader; `make test` does not run them."""
