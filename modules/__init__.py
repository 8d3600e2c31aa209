"""Factorization, frozen tables and the two-tower network: plain functions and `nn.Module`s, usable without our trainer."""
