"""Tasks about dates, months, weekdays and the clock."""

from __future__ import annotations

import calendar
import random

from glider_dist.tasks.procedural.recipe import Recipe
from glider_dist.tasks.procedural.vocabulary import ACTIVITIES, NAMES, OBJECTS, one_of

# Not calendar.month_name: that follows the locale.
_MONTHS = tuple(
    "January February March April May June July August September October November December".split()
)
_WEEKDAYS = tuple("Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split())
_EVENTS = (
    "The train leaves at",
    "The shop closes at",
    "The film starts at",
    "We have lunch at",
    "The bus arrives at",
    "Our call is at",
    "The alarm rings at",
    "The lesson ends at",
    "The guests come at",
    "The museum opens at",
)


def _date(rng: random.Random) -> tuple[int, int, int]:
    year, month = rng.randint(1950, 2029), rng.randint(1, 12)
    return year, month, rng.randint(1, calendar.monthrange(year, month)[1])


def _date_in_words(rng: random.Random) -> tuple[str, str]:
    year, month, day = _date(rng)
    return f"{year}-{month:02d}-{day:02d}", f"{day} {_MONTHS[month - 1]} {year}"


def _date_american(rng: random.Random) -> tuple[str, str]:
    year, month, day = _date(rng)
    return f"{year}-{month:02d}-{day:02d}", f"{_MONTHS[month - 1]} {day}, {year}"


def _plan_in_month(rng: random.Random) -> tuple[str, int]:
    month = rng.randrange(12)
    return f"{rng.choice(NAMES)} {rng.choice(ACTIVITIES)} in {_MONTHS[month]}", month


def _month_number(rng: random.Random) -> tuple[str, str]:
    plan, month = _plan_in_month(rng)
    return plan, str(month + 1)


def _next_month(rng: random.Random) -> tuple[str, str]:
    plan, month = _plan_in_month(rng)
    return plan, _MONTHS[(month + 1) % 12]


def _next_weekday(rng: random.Random) -> tuple[str, str]:
    day = rng.randrange(7)
    return f"{rng.choice(NAMES)} {rng.choice(ACTIVITIES)} on {_WEEKDAYS[day]}", _WEEKDAYS[(day + 1) % 7]


def _clock(rng: random.Random) -> tuple[str, str, str]:
    hour, minute = rng.randrange(24), rng.randrange(60)
    return (
        rng.choice(_EVENTS),
        f"{hour:02d}:{minute:02d}",
        f"{(hour - 1) % 12 + 1}:{minute:02d} {'am' if hour < 12 else 'pm'}",
    )


def _clock_12_hours(rng: random.Random) -> tuple[str, str]:
    event, long, short = _clock(rng)
    return f"{event} {long}", short


def _clock_24_hours(rng: random.Random) -> tuple[str, str]:
    event, long, short = _clock(rng)
    return f"{event} {short}", long


def _year_in_text(rng: random.Random) -> tuple[str, str]:
    year, count = rng.randint(1700, 2029), rng.randint(2, 99)
    name, thing = rng.choice(NAMES), rng.choice(OBJECTS)
    sentence = one_of(
        rng,
        f"{name} sold {count} {thing}s in {year}",
        f"In {year} {name} owned {count} {thing}s",
        f"The {year} sale of {count} {thing}s pleased {name}",
        f"After {year} there were {count} {thing}s left",
    )
    return sentence, str(year)


