"""Baselines: plain implementations of what published code does, for comparison on the same weights and data."""
