"""Tasks about numbers."""

from __future__ import annotations

import random

from glider_dist.tasks.procedural.recipe import Recipe
from glider_dist.tasks.procedural.vocabulary import NOUNS

_UNITS = tuple("one two three four five six seven eight nine".split())
_TENS = tuple("twenty thirty forty fifty sixty seventy eighty ninety".split())


def _in_words(number: int) -> str:
    """20 to 99 in words."""
    tens, unit = _TENS[number // 10 - 2], number % 10
    return f"{tens}-{_UNITS[unit - 1]}" if unit else tens


def _larger_number(rng: random.Random) -> tuple[str, str]:
    pair = rng.sample(range(10, 100), 2)
    return f"{pair[0]} and {pair[1]}", str(max(pair))


def _largest_of_three(rng: random.Random) -> tuple[str, str]:
    three = rng.sample(range(10, 100), 3)
    return f"{three[0]}, {three[1]} and {three[2]}", str(max(three))


def _words_to_digits(rng: random.Random) -> tuple[str, str]:
    number = rng.randint(20, 99)
    return f"{_in_words(number)} {rng.choice(NOUNS)[1]}", str(number)


def _digits_to_words(rng: random.Random) -> tuple[str, str]:
    number = rng.randint(20, 99)
    return f"{number} {rng.choice(NOUNS)[1]}", _in_words(number)


