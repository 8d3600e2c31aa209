"""Synthetic logs with planted structure: tastes of users, and groups of interchangeable ids.

May import every other subpackage of `data`.
"""
