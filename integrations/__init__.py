"""Adapters, one folder per host framework."""
