"""Examples of tasks as a base model reads them."""

from __future__ import annotations

from glider_dist.errors import GliderError
from glider_dist.model.batch import Collator, Encoded
from glider_dist.tasks.prompt import answer, prompt
from glider_dist.tasks.task import Example, Task


def encode_example(collator: Collator, task: Task, part: str, example: Example) -> tuple[str, Encoded]:
    """An example's instruction, which is embedded for the global router, and its prompt and target as token ids.

    Raises:
        GliderError: a target too long, naming task, part and example.
    """
    instruction = task.instruction(example, part)
    try:
        return instruction, collator.encode(prompt(instruction, example.input), answer(example.target))
    except GliderError as error:
        raise GliderError(f"task {task.name!r}, {part}, example {example.id!r}: {error}") from None
