"""Algorithms, free of any host framework."""
