"""KVzip for ``generate``: a cache that holds a compressed context."""

from .cache import KVzipCache

__all__ = ["KVzipCache"]
