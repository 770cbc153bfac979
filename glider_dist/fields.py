"""Declaring settings: a dataclass field with its meaning, its allowed values, and what a number has to be."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import field, fields, is_dataclass
from functools import partial
from numbers import Integral, Real
from typing import Any

from glider_dist.errors import GliderError

_MUST_BE: dict[str, Callable[[float], bool]] = {
    "positive and finite": lambda value: 0 < value < math.inf,
    "finite and not negative": lambda value: 0 <= value < math.inf,
    "finite": math.isfinite,
    "a port, 0 to 65535": lambda value: 0 <= value <= 65535,
    "more than 0 and at most 1": lambda value: 0 < value <= 1,
}


def setting(default: Any, doc: str, choices: tuple[str, ...] = (), must_be: str | None = None) -> Any:
    """``must_be``: what the number has to be, a key of ``_MUST_BE``; None and other types are not looked at."""
    metadata = {"doc": doc, "choices": choices, "must_be": must_be}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


positive = partial(setting, must_be="positive and finite")
not_negative = partial(setting, must_be="finite and not negative")
finite = partial(setting, must_be="finite")


share = partial(setting, must_be="more than 0 and at most 1")


def check_numbers(config: Any, prefix: str = "") -> None:
    """Raises GliderError for the first number that is none, or not as its field says."""
    for item in fields(config):
        value, key = getattr(config, item.name), prefix + item.name
        if is_dataclass(value):
            check_numbers(value, f"{key}.")
        rule = item.metadata.get("must_be")
        if rule is None or value is None:
            continue
        # A file's types are checked as it is read; in Python anything can be given.
        whole = str(item.type).startswith("int")
        if isinstance(value, bool) or not isinstance(value, Integral if whole else Real):
            raise GliderError(f"{key} is {value!r}, but must be a {'whole ' * whole}number")
        if not _MUST_BE[rule](float(value)):
            raise GliderError(f"{key} is {value}, but must be {rule}")
