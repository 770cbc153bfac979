"""The one format in which every base model sees every task."""

from __future__ import annotations


def prompt(instruction: str, text: str | None) -> str:
    """What the model reads before it answers. It ends without a space, since the answer starts with one.

    Args:
        text: the task's input; None: the instruction is all there is.
    """
    return f"{instruction}\nOutput:" if text is None else f"{instruction}\nInput: {text}\nOutput:"


def answer(target: str) -> str:
    """What the model has to write after the prompt. The end token is added where the text is tokenised."""
    return " " + target
