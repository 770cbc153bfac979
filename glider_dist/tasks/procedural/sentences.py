"""Examples about whole sentences: what they mention, who does what in them, what they express or ask.

Every function draws an input and its answer.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial

from glider_dist.tasks.procedural.vocabulary import (
    BLAME,
    COLOURS,
    NAMES,
    OBJECTS,
    PRAISE,
    SIZES,
    SURNAMES,
    VERBS,
    listed,
)

_DOMAIN_STARTS = listed("blue green north river stone bright star sun moon lake hill city home fast smart open")
_DOMAIN_ENDS = listed("mail lake works shop books press bank school media travel garden music")
_FILM_PARTS = listed(
    "film movie plot ending acting music story script cast comedy drama documentary sequel dialogue "
    "scenery cartoon thriller opening finale soundtrack"
)
_DEGREES = listed("really quite simply very truly")


def _colour_word(rng: random.Random) -> tuple[str, str]:
    colour, size, name = rng.choice(COLOURS), rng.choice(SIZES), rng.choice(NAMES)
    thing, other = rng.sample(OBJECTS, 2)
    sentences = (
        f"The {size} {colour} {thing} is next to the {other}",
        f"{name} has a {size} {thing} and a {colour} {other}",
        f"{name} put the {colour} {thing} on the {size} {other}",
        f"We saw the {size} {thing} behind the {colour} {other}",
    )
    return rng.choice(sentences), colour


def _handover(asked: str, rng: random.Random) -> tuple[str, str]:
    giver, receiver = rng.sample(NAMES, 2)
    thing = rng.choice(OBJECTS)
    sentences = (
        f"{giver} gave {receiver} the {thing}",
        f"{giver} handed the {thing} to {receiver}",
        f"{receiver} got the {thing} from {giver}",
        f"The {thing} was sent to {receiver} by {giver}",
    )
    return rng.choice(sentences), giver if asked == "giver" else receiver


def _address(asked: str, rng: random.Random) -> tuple[str, str]:
    user = f"{rng.choice(NAMES).lower()}.{rng.choice(SURNAMES)}"
    domain = f"{rng.choice(_DOMAIN_STARTS)}{rng.choice(_DOMAIN_ENDS)}.{rng.choice(('com', 'org', 'net'))}"
    sentences = (
        f"Please write to {user}@{domain}",
        f"My address is {user}@{domain} since May",
        f"Send the {rng.choice(OBJECTS)} photos to {user}@{domain}",
        f"{user}@{domain} did not answer",
    )
    return rng.choice(sentences), user if asked == "user" else domain


def _verdict(things: tuple[str, ...], rng: random.Random) -> tuple[str, str]:
    verdict = rng.choice(("plus", "minus"))
    first, second = rng.sample(PRAISE if verdict == "plus" else BLAME, 2)
    feeling = rng.choice(("love", "enjoy", "like") if verdict == "plus" else ("hate", "regret", "dislike"))
    thing, degree = rng.choice(things), rng.choice(_DEGREES)
    remarks = (
        f"The {thing} is {degree} {first}",
        f"I {feeling} this {thing}, it is {first}",
        f"The {thing} was {first} and {second}",
        f"{first.capitalize()} {thing}, {degree} {second}",
    )
    return rng.choice(remarks), verdict


def _question_kind(rng: random.Random) -> tuple[str, str]:
    name, thing, (base, past, _) = rng.choice(NAMES), rng.choice(OBJECTS), rng.choice(VERBS)
    questions = {
        "human": (f"Who {past} the {thing}?", f"Which friend of {name} {past} the {thing}?"),
        "spot": (f"Where did {name} {base} the {thing}?", f"In which town did {name} {base} the {thing}?"),
        "moment": (f"When did {name} {base} the {thing}?", f"On which day did {name} {base} the {thing}?"),
        "amount": (f"How many {thing}s did {name} {base}?", f"What number of {thing}s did {name} {base}?"),
    }
    kind = rng.choice(tuple(questions))
    return rng.choice(questions[kind]), kind


DRAWS: dict[str, Callable[[random.Random], tuple[str, str]]] = {
    "colour_word": _colour_word,
    "giver": partial(_handover, "giver"),
    "receiver": partial(_handover, "receiver"),
    "email_domain": partial(_address, "domain"),
    "email_user": partial(_address, "user"),
    "product_verdict": partial(_verdict, OBJECTS),
    "film_verdict": partial(_verdict, _FILM_PARTS),
    "question_kind": _question_kind,
}
