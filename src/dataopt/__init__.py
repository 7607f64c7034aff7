"""dataopt: data optimisation for the frameworks you already use."""

__version__ = "0.1.0"
