"""Stages, train loop, sharding plan, metrics, reports and the command line."""
