"""Names of experts: what is allowed, and the order that every rank and every stage agrees on."""

from __future__ import annotations

import re

from glider_dist.errors import GliderError

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]*")


def check_name(name: str, what: str = "expert") -> str:
    """Return ``name`` if it can safely be a folder's name.

    Raises:
        GliderError: if it is empty, too long, starts with a dot or holds anything but letters, digits, ``_ . -``.
    """
    if not _NAME.fullmatch(name) or len(name) > 200:
        raise GliderError(
            f"{what} name {name!r} is not allowed: use up to 200 letters, digits, '_', '-' and '.', "
            "without path separators and not starting with '.' or '-'"
        )
    return name


def natural_key(name: str) -> tuple[list[tuple[int, int, str]], str]:
    """Sort key that puts ``expert_2`` before ``expert_10``; ``1`` and ``01`` have different keys."""
    parts = re.split(r"(\d+)", name)
    numbered = [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in parts if part]
    return numbered, name
