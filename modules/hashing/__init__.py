"""Learned hash functions: maps from the ids of a table to fewer rows (Ghaemmaghami et al. 2022), and their peers."""
