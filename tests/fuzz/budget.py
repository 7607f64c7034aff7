"""How hard to try: a fixed, quick draw in the suite; ``FUZZ=50`` tries 50 times as many, other ones each time."""

import os

from hypothesis import HealthCheck, settings

_TIMES = int(os.environ.get("FUZZ", "0"))


def tries(count: int) -> settings:
    return settings(
        max_examples=count * max(_TIMES, 1),
        deadline=None,
        derandomize=not _TIMES,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
