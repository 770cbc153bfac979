"""The one format in which every base model sees every task."""

from __future__ import annotations

from glider_dist.tasks.task import Example


def prompt(instruction: str, example: Example) -> str:
    """What the model reads before it answers. It ends without a space, since the answer starts with one."""
    return f"{instruction}\nInput: {example.input}\nOutput:"


def answer(target: str) -> str:
    """What the model has to write after the prompt. The end token is added where the text is tokenised."""
    return " " + target
