"""Baselines: plain implementations of published methods, for comparison on the same weights and data."""
