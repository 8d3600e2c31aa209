"""Measurements beside their peers, one file a question; `recpress bench` lists and runs them."""
