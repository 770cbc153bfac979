"""Examples about numbers. Every function draws an input and its answer."""

from __future__ import annotations

import random
from collections.abc import Callable

from glider_dist.tasks.procedural.vocabulary import NOUNS, listed

_UNITS = listed("one two three four five six seven eight nine")
_UNIT_RANKS = listed("first second third fourth fifth sixth seventh eighth ninth")
_TENS = listed("twenty thirty forty fifty sixty seventy eighty ninety")


def _larger_number(rng: random.Random) -> tuple[str, str]:
    first, second = rng.sample(range(10, 100), 2)
    return f"{first} and {second}", str(max(first, second))


def _largest_of_three(rng: random.Random) -> tuple[str, str]:
    first, second, third = rng.sample(range(10, 100), 3)
    return f"{first}, {second} and {third}", str(max(first, second, third))


def _digits_to_words(rng: random.Random) -> tuple[str, str]:
    number = rng.randint(20, 99)
    tens, unit = _TENS[number // 10 - 2], number % 10
    written = f"{tens}-{_UNITS[unit - 1]}" if unit else tens
    return f"{number} {rng.choice(NOUNS)[1]}", written


def _digits_to_ordinal(rng: random.Random) -> tuple[str, str]:
    number = rng.randint(20, 99)
    tens, unit = _TENS[number // 10 - 2], number % 10
    rank = f"{tens}-{_UNIT_RANKS[unit - 1]}" if unit else tens.replace("ty", "tieth")
    return f"{number} {rng.choice(NOUNS)[1]}", rank


DRAWS: dict[str, Callable[[random.Random], tuple[str, str]]] = {
    "larger_number": _larger_number,
    "largest_of_three": _largest_of_three,
    "digits_to_words": _digits_to_words,
    "digits_to_ordinal": _digits_to_ordinal,
}
