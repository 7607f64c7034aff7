"""Functions for Hugging Face ``datasets``."""
