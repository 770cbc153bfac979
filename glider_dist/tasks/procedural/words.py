"""Tasks about the words of a line: which one stands where, which one is an animal, how it is inflected."""

from __future__ import annotations

import random

from glider_dist.tasks.procedural.recipe import Recipe
from glider_dist.tasks.procedural.vocabulary import (
    ANIMALS,
    COLOURS,
    FOODS,
    NAMES,
    NOUNS,
    OBJECTS,
    OPPOSITES,
    VERBS,
    one_of,
)

_LINE = (*(name for name in OBJECTS), *COLOURS, *(verb[0] for verb in VERBS))


def _line(rng: random.Random) -> list[str]:
    return rng.sample(_LINE, rng.randint(4, 7))


def _nth_word(rng: random.Random, position: int) -> tuple[str, str]:
    words = _line(rng)
    return " ".join(words), words[position]


def _last_word(rng: random.Random) -> tuple[str, str]:
    return _nth_word(rng, -1)


def _second_word(rng: random.Random) -> tuple[str, str]:
    return _nth_word(rng, 1)


def _third_word(rng: random.Random) -> tuple[str, str]:
    return _nth_word(rng, 2)


def _pick(rng: random.Random, kind: tuple[str, ...]) -> tuple[str, str]:
    wanted = rng.choice(kind)
    words = [wanted, *rng.sample(OBJECTS, 3)]
    rng.shuffle(words)
    return ", ".join(words), wanted


def _pick_animal(rng: random.Random) -> tuple[str, str]:
    return _pick(rng, ANIMALS)


def _pick_food(rng: random.Random) -> tuple[str, str]:
    return _pick(rng, FOODS)


def _plural_pair(rng: random.Random) -> tuple[str, str]:
    (one, ones), (other, others) = rng.sample(NOUNS, 2)
    return f"{one} and {other}", f"{ones} and {others}"


def _singular_pair(rng: random.Random) -> tuple[str, str]:
    singular, plural = _plural_pair(rng)
    return plural, singular


def _verb(rng: random.Random, form: int) -> tuple[str, str]:
    verb = rng.choice(VERBS)
    return f"{rng.choice(NAMES)} will {verb[0]} the {rng.choice(OBJECTS)}", verb[form]


def _verb_past(rng: random.Random) -> tuple[str, str]:
    return _verb(rng, 1)


def _verb_ing(rng: random.Random) -> tuple[str, str]:
    return _verb(rng, 2)


def _opposite(rng: random.Random) -> tuple[str, str]:
    pair = rng.choice(OPPOSITES)
    side = rng.randrange(2)
    thing = rng.choice(OBJECTS)
    line = one_of(
        rng,
        f"The {thing} is {pair[side]}",
        f"This {thing} looks {pair[side]}",
        f"How {pair[side]} the {thing} is",
    )
    return line, pair[1 - side]


