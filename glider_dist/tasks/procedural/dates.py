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


def _plan(rng: random.Random) -> str:
    return f"{rng.choice(NAMES)} {rng.choice(ACTIVITIES)}"


def _month_number(rng: random.Random) -> tuple[str, str]:
    month = rng.randrange(12)
    return f"{_plan(rng)} in {_MONTHS[month]}", str(month + 1)


def _next(preposition: str, cycle: tuple[str, ...], rng: random.Random) -> tuple[str, str]:
    now = rng.randrange(len(cycle))
    return f"{_plan(rng)} {preposition} {cycle[now]}", cycle[(now + 1) % len(cycle)]


DRAWS: dict[str, Callable[[random.Random], tuple[str, str]]] = {
    "date_in_words": partial(_date, "british"),
    "date_american": partial(_date, "american"),
    "month_number": _month_number,
    "next_weekday": partial(_next, "on", _WEEKDAYS),
    "next_month": partial(_next, "in", _MONTHS),
}
