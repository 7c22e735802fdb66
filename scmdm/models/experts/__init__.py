"""Mixtures of experts: router, expert block, expert parallelism."""
