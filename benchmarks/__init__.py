"""Measurements and their peers, one file per question; `recpress bench` lists and runs them."""
