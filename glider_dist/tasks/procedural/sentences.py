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
    one_of,
)

_DOMAIN_STARTS = listed("blue green north river stone bright star sun moon lake hill city home fast smart open")
_DOMAIN_ENDS = listed("mail lake works shop books press bank school media travel garden music")
_FILM_PARTS = listed(
    "film movie plot ending acting music story script cast comedy drama documentary sequel dialogue "
    "scenery cartoon thriller opening finale soundtrack"
)
_DEGREES = listed("really quite simply very truly")


_COLOURED = (
    "The {size} {colour} {thing} is next to the {other}",
    "{name} has a {size} {thing} and a {colour} {other}",
    "{name} put the {colour} {thing} on the {size} {other}",
    "We saw the {size} {thing} behind the {colour} {other}",
)
_HANDOVERS = (
    "{giver} gave {receiver} the {thing}",
    "{giver} handed the {thing} to {receiver}",
    "{receiver} got the {thing} from {giver}",
    "The {thing} was sent to {receiver} by {giver}",
)
_MAILS = (
    "Please write to {address}",
    "My address is {address} since May",
    "Send the {thing} photos to {address}",
    "{address} did not answer",
)
_REMARKS = (
    "The {thing} is {degree} {first}",
    "I {feeling} this {thing}, it is {first}",
    "The {thing} was {first} and {second}",
    "{start} {thing}, {degree} {second}",
)
_QUESTIONS = {
    "human": ("Who {past} the {thing}?", "Which friend of {name} {past} the {thing}?"),
    "spot": ("Where did {name} {base} the {thing}?", "In which town did {name} {base} the {thing}?"),
    "moment": ("When did {name} {base} the {thing}?", "On which day did {name} {base} the {thing}?"),
    "amount": ("How many {thing}s did {name} {base}?", "What number of {thing}s did {name} {base}?"),
}


def _colour_word(rng: random.Random) -> tuple[str, str]:
    colour, size, name = rng.choice(COLOURS), rng.choice(SIZES), rng.choice(NAMES)
    thing, other = rng.sample(OBJECTS, 2)
    return one_of(rng, _COLOURED, colour=colour, size=size, name=name, thing=thing, other=other), colour


def _handover(asked: str, rng: random.Random) -> tuple[str, str]:
    giver, receiver = rng.sample(NAMES, 2)
    people = {"giver": giver, "receiver": receiver}
    return one_of(rng, _HANDOVERS, **people, thing=rng.choice(OBJECTS)), people[asked]


def _address(asked: str, rng: random.Random) -> tuple[str, str]:
    user = f"{rng.choice(NAMES).lower()}.{rng.choice(SURNAMES)}"
    domain = f"{rng.choice(_DOMAIN_STARTS)}{rng.choice(_DOMAIN_ENDS)}.{rng.choice(('com', 'org', 'net'))}"
    thing = rng.choice(OBJECTS)
    return one_of(rng, _MAILS, address=f"{user}@{domain}", thing=thing), user if asked == "user" else domain


def _verdict(things: tuple[str, ...], rng: random.Random) -> tuple[str, str]:
    verdict = rng.choice(("plus", "minus"))
    first, second = rng.sample(PRAISE if verdict == "plus" else BLAME, 2)
    feeling = rng.choice(("love", "enjoy", "like") if verdict == "plus" else ("hate", "regret", "dislike"))
    words = {"thing": rng.choice(things), "degree": rng.choice(_DEGREES), "start": first.capitalize()}
    return one_of(rng, _REMARKS, **words, first=first, second=second, feeling=feeling), verdict


def _question_kind(rng: random.Random) -> tuple[str, str]:
    name, thing, (base, past, _) = rng.choice(NAMES), rng.choice(OBJECTS), rng.choice(VERBS)
    kind = rng.choice(tuple(_QUESTIONS))
    return one_of(rng, _QUESTIONS[kind], name=name, thing=thing, base=base, past=past), kind


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
