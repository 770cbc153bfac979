"""The embedded tasks: drawn from a seed, so that everything runs without a network or a data set.

They are easy for a small expert (short inputs, answers of a few tokens) but hardly solved without one, since their
answers follow formats and labels of their own. The held-out tasks are relatives of the held-in ones: another item of
the line, another date format, the same verdicts about other things.
"""

from __future__ import annotations

from functools import partial

from glider_dist.tasks.procedural import dates, labels, numbers, phrases, words
from glider_dist.tasks.procedural.recipe import Recipe, draw_examples
from glider_dist.tasks.task import Example, Task

RECIPES: tuple[Recipe, ...] = (
    *words.RECIPES,
    *phrases.RECIPES,
    *labels.RECIPES,
    *dates.RECIPES,
    *numbers.RECIPES,
)

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

_DEFAULT_COUNTS = {"train": 512, "validation": 64, "test": 64}


def make_tasks(seed: int, limit: int | None) -> list[Task]:
    """Every embedded task. Examples are drawn when a part is asked for.

    Args:
        seed: another seed gives other examples, but never moves an input from one part to another.
        limit: examples per task and part; ``None``: 512 for train, 64 for validation and 64 for test.
    """
    return [
        Task(
            name=recipe.name,
            definition=recipe.definition,
            split=recipe.split,
            metric="exact_match",
            category=recipe.category,
            descriptions=recipe.descriptions,
            instructions=recipe.instructions,
            evaluation_only=False,
            load=partial(_load, recipe, seed, limit),
        )
        for recipe in RECIPES
    ]


def _load(recipe: Recipe, seed: int, limit: int | None, part: str) -> list[Example]:
    return draw_examples(recipe, seed, limit or _DEFAULT_COUNTS[part], part)
