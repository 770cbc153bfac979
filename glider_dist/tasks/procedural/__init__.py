"""The embedded tasks: drawn from a seed, so that everything runs without a network or a data set.

They are easy for a small expert (short inputs, answers of a few tokens) but hardly solved without one,
since their answers follow formats and labels of their own. The held-out tasks are relatives of the held-in
ones: another item of the line, another date format, the same verdicts about other things.

``texts.json`` holds the texts of every task, in the form of a data set mapping (see ``tasks.hub``). Of the
six instructions, 0 to 2 are seen in training and 3 to 5 in tests only; none repeats a description or a
definition of any task. The functions that draw the examples are in ``words``, ``sentences``, ``dates`` and
``numbers``.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from pathlib import Path

from glider_dist.errors import GliderError
from glider_dist.tasks.procedural import dates, numbers, sentences, words
from glider_dist.tasks.record import make_task, task_records
from glider_dist.tasks.task import Example, Task, stable_hash

Draw = Callable[[random.Random], tuple[str, str]]

# Six topics that have little in common, with the shortest answers, and a relative of three of them.
QUICKSTART_HELD_IN = (
    "last_word",
    "next_weekday",
    "pick_animal",
    "product_verdict",
    "question_kind",
    "verb_past",
)
QUICKSTART_HELD_OUT = ("film_verdict", "next_month", "pick_food")

_DRAWS: dict[str, Draw] = {**words.DRAWS, **sentences.DRAWS, **dates.DRAWS, **numbers.DRAWS}
_DEFAULT_COUNTS = {"train": 512, "validation": 64, "test": 64}
# Of ten inputs, eight belong to train, one to validation and one to test.
_SHARES = ("train",) * 8 + ("validation", "test")
_DRAWS_PER_EXAMPLE = 400


def make_tasks(seed: int, limit: int | None) -> list[Task]:
    """Every embedded task. Examples are drawn when a part is asked for.

    Args:
        seed: another seed gives other examples, but never moves an input from one part to another.
        limit: examples per task and part; ``None``: 512 for train, 64 for validation and 64 for test.
    """
    path = Path(__file__).with_name("texts.json")
    tasks = []
    for record in task_records(path):
        choices = tuple(record["choices"]) if "choices" in record else None
        tasks.append(
            make_task(
                record,
                str(path),
                partial(_draw_examples, record["name"], choices, seed, limit),
                descriptions=tuple(record["descriptions"]),
                instructions=tuple(record["instructions"]),
            )
        )
    return tasks


def _part_of(name: str, input: str) -> str:
    """The part that an input belongs to, whatever the seed: no input of a test is ever trained on."""
    return _SHARES[stable_hash(f"{name}:{input}") % len(_SHARES)]


def _draw_examples(
    name: str, choices: tuple[str, ...] | None, seed: int, limit: int | None, part: str
) -> list[Example]:
    """Examples with different inputs. A larger limit with the same seed starts with the same examples."""
    count = _DEFAULT_COUNTS[part] if limit is None else limit
    rng = random.Random(f"{seed}-{name}-{part}")
    examples: list[Example] = []
    seen: set[str] = set()
    for _ in range(_DRAWS_PER_EXAMPLE * count):
        input, target = _DRAWS[name](rng)
        if input in seen or _part_of(name, input) != part:
            continue
        seen.add(input)
        examples.append(Example(f"{name}-{part}-{len(examples):05d}", input, target, (target,), choices))
        if len(examples) == count:
            return examples
    raise GliderError(
        f"task {name!r} has no {count} different inputs for {part} (only {len(examples)} were found); "
        "lower tasks.limit"
    )
