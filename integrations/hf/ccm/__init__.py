"""CCM for transformers (thesis chapter 7): a PEFT adapter that compresses contexts, and the cache of their memory."""

from .cache import CCMCache
from .config import CCMConfig
from .model import CCMModel
from .stream import CCMStream

__all__ = ["CCMCache", "CCMConfig", "CCMModel", "CCMStream"]
