"""Examples about single words: which one stands where, what it names, how it is inflected.

Every function draws an input and its answer.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial

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

_REMARKS = ("The {thing} is {word}", "This {thing} looks {word}", "How {word} the {thing} is")
_LINE = (*OBJECTS, *COLOURS, *(base for base, _, _ in VERBS))


def _word_at(position: int, rng: random.Random) -> tuple[str, str]:
    line = rng.sample(_LINE, rng.randint(4, 7))
    return " ".join(line), line[position]


def _pick(kind: tuple[str, ...], rng: random.Random) -> tuple[str, str]:
    wanted = rng.choice(kind)
    listed = [wanted, *rng.sample(OBJECTS, 3)]
    rng.shuffle(listed)
    return ", ".join(listed), wanted


def _plural_pair(rng: random.Random) -> tuple[str, str]:
    (one, ones), (other, others) = rng.sample(NOUNS, 2)
    return f"{one} and {other}", f"{ones} and {others}"


def _singular_pair(rng: random.Random) -> tuple[str, str]:
    singular, plural = _plural_pair(rng)
    return plural, singular


def _verb(form: int, rng: random.Random) -> tuple[str, str]:
    verb = rng.choice(VERBS)
    return f"{rng.choice(NAMES)} will {verb[0]} the {rng.choice(OBJECTS)}", verb[form]


def _opposite(rng: random.Random) -> tuple[str, str]:
    word, opposite = rng.sample(rng.choice(OPPOSITES), 2)
    thing = rng.choice(OBJECTS)
    return one_of(rng, _REMARKS, thing=thing, word=word), opposite


DRAWS: dict[str, Callable[[random.Random], tuple[str, str]]] = {
    "last_word": partial(_word_at, -1),
    "second_word": partial(_word_at, 1),
    "third_word": partial(_word_at, 2),
    "pick_animal": partial(_pick, ANIMALS),
    "pick_food": partial(_pick, FOODS),
    "plural_pair": _plural_pair,
    "singular_pair": _singular_pair,
    "verb_past": partial(_verb, 1),
    "verb_ing": partial(_verb, 2),
    "opposite": _opposite,
}
