"""Factorization, frozen tables and the two-tower network: functions and `nn.Module`s that need no trainer."""
