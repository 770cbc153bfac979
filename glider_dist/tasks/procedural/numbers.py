"""Examples about numbers. Every function draws an input and its answer."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial

from glider_dist.tasks.procedural.vocabulary import NOUNS, listed

_UNITS = listed("one two three four five six seven eight nine")
_UNIT_RANKS = listed("first second third fourth fifth sixth seventh eighth ninth")
_TENS = listed("twenty thirty forty fifty sixty seventy eighty ninety")


def _largest(count: int, rng: random.Random) -> tuple[str, str]:
    *others, last = rng.sample(range(10, 100), count)
    return f"{', '.join(map(str, others))} and {last}", str(max(*others, last))


def _in_words(round_tens: tuple[str, ...], units: tuple[str, ...], rng: random.Random) -> tuple[str, str]:
    number = rng.randint(20, 99)
    tens, unit = divmod(number, 10)
    written = f"{_TENS[tens - 2]}-{units[unit - 1]}" if unit else round_tens[tens - 2]
    return f"{number} {rng.choice(NOUNS)[1]}", written


DRAWS: dict[str, Callable[[random.Random], tuple[str, str]]] = {
    "larger_number": partial(_largest, 2),
    "largest_of_three": partial(_largest, 3),
    "digits_to_words": partial(_in_words, _TENS, _UNITS),
    "digits_to_ordinal": partial(_in_words, tuple(tens.replace("ty", "tieth") for tens in _TENS), _UNIT_RANKS),
}
