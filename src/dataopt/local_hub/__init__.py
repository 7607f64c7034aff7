"""A Hub on this machine, to rehearse a push: for the demo and the tests, not to be offered to others."""

from .server import Hub

__all__ = ["Hub"]
