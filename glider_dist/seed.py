"""Seeds of what is drawn at random: the same wherever and with whomever it is drawn."""

from __future__ import annotations

import hashlib


def seed_of(seed: int, *names: str) -> int:
    """A seed, below 2^63, that follows from the run's seed and names alone."""
    digest = hashlib.sha256("/".join([str(seed), *names]).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
