"""Examples about dates, years, months and weekdays.

Every function draws an input and its answer.
"""

from __future__ import annotations

import calendar
import random
from collections.abc import Callable
from functools import partial

from glider_dist.tasks.procedural.vocabulary import ACTIVITIES, NAMES, listed

# Not calendar.month_name and day_name: these follow the locale.
_MONTHS = listed("January February March April May June July August September October November December")
_WEEKDAYS = listed("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")


def _date(style: str, rng: random.Random) -> tuple[str, str]:
    year, month = rng.randint(1950, 2029), rng.randint(1, 12)
    day, name = rng.randint(1, calendar.monthrange(year, month)[1]), _MONTHS[month - 1]
    written = f"{day} {name} {year}" if style == "british" else f"{name} {day}, {year}"
    return f"{year}-{month:02d}-{day:02d}", written


def _planned(
    preposition: str, cycle: tuple[str, ...], answers: tuple[str, ...], rng: random.Random
) -> tuple[str, str]:
    """Something planned for one entry of a cycle, and the answer at that place."""
    now = rng.randrange(len(cycle))
    plan = f"{rng.choice(NAMES)} {rng.choice(ACTIVITIES)}"
    return f"{plan} {preposition} {cycle[now]}", answers[now]


def _after(cycle: tuple[str, ...]) -> tuple[str, ...]:
    return cycle[1:] + cycle[:1]


DRAWS: dict[str, Callable[[random.Random], tuple[str, str]]] = {
    "date_in_words": partial(_date, "british"),
    "date_american": partial(_date, "american"),
    "month_number": partial(_planned, "in", _MONTHS, tuple(str(number) for number in range(1, 13))),
    "next_weekday": partial(_planned, "on", _WEEKDAYS, _after(_WEEKDAYS)),
    "next_month": partial(_planned, "in", _MONTHS, _after(_MONTHS)),
}
