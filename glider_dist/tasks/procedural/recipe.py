"""What one embedded task is made of, and how its examples are drawn."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from glider_dist.errors import GliderError
from glider_dist.tasks.task import Example, stable_hash

# Of ten inputs, eight belong to train, one to validation and one to test.
_SHARES = ("train",) * 8 + ("validation", "test")
_DRAWS_PER_EXAMPLE = 400


@dataclass(frozen=True)
class Recipe:
    """A task as text and a generator.

    ``draw`` gives one input and its answer. Its instructions come in two halves: 0 to 2 are seen in training, 3 to 5
    in tests only. No instruction repeats a description or a definition of any task.
    """

    name: str
    split: str
    category: str
    definition: str
    draw: Callable[[random.Random], tuple[str, str]]
    descriptions: tuple[str, str]
    instructions: tuple[str, str, str, str, str, str]
    choices: tuple[str, ...] | None = None


def part_of(name: str, input: str) -> str:
    """The part that an input belongs to, whatever the seed: no input of a test is ever trained on."""
    return _SHARES[stable_hash(f"{name}:{input}") % len(_SHARES)]


def draw_examples(recipe: Recipe, seed: int, count: int, part: str) -> list[Example]:
    """``count`` examples with different inputs. A larger count with the same seed starts with the same examples.

    Raises:
        GliderError: if the task has too few different inputs.
    """
    rng = random.Random(f"{seed}-{recipe.name}-{part}")
    examples: list[Example] = []
    seen: set[str] = set()
    for _ in range(_DRAWS_PER_EXAMPLE * count):
        input, target = recipe.draw(rng)
        if input in seen or part_of(recipe.name, input) != part:
            continue
        seen.add(input)
        example_id = f"{recipe.name}-{part}-{len(examples):05d}"
        examples.append(Example(example_id, input, target, (target,), recipe.choices))
        if len(examples) == count:
            return examples
    raise GliderError(
        f"task {recipe.name!r} has no {count} different inputs for {part} (only {len(examples)} were found); "
        "lower tasks.limit"
    )
