"""``python -m dataopt``."""

from .cli import main

main()
