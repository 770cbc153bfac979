"""What a task is: named examples in three parts, and instructions in several wordings."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from glider_dist.errors import GliderError

PARTS = ("train", "validation", "test")


def stable_hash(text: str) -> int:
    """A 64-bit integer that depends on the text alone, unlike Python's salted ``hash``."""
    return int.from_bytes(hashlib.sha256(text.encode("utf-8")).digest()[:8], "big")


@dataclass(frozen=True)
class Example:
    """One input and its answer. ``targets`` holds every accepted answer, ``target`` first."""

    id: str
    input: str
    target: str
    targets: tuple[str, ...]
    choices: tuple[str, ...] | None


@dataclass(frozen=True)
class Task:
    """A task and how to read it.

    Attributes:
        name: unique; it becomes the name of the task's expert and of its folder in the pool.
        definition: what to do, in the task author's words.
        split: ``held_in`` (an expert is trained for it) or ``held_out`` (evaluated only).
        metric: ``exact_match`` or ``rouge_l``.
        category: the kind of task, for reports.
        descriptions: sentences about what an expert for this task does; ``()`` if nobody wrote any.
        instructions: the definition in other words, as a user would ask; ``()``: the definition is used.
        evaluation_only: never trained on, not even for calibration (BIG-bench and its canary).
        load: reads one part (``train``, ``validation`` or ``test``), up to the configured limit.
        settings: of ``train.*``, in place of the job's for this task's expert and gate.
        origin: by part, the file below ``tasks.path`` that its examples come from; empty if there is none.
    """

    name: str
    definition: str
    split: str
    metric: str
    category: str
    descriptions: tuple[str, ...]
    instructions: tuple[str, ...]
    evaluation_only: bool
    load: Callable[[str], list[Example]]
    settings: dict[str, Any] = field(default_factory=dict, hash=False)
    origin: dict[str, str] = field(default_factory=dict, hash=False)
    _read: dict[str, tuple[Example, ...]] = field(init=False, default_factory=dict, repr=False, compare=False)

    def examples(self, part: str) -> list[Example]:
        """The examples of one part. They are read once, on the first call.

        Raises:
            GliderError: if the part is missing, empty or malformed, or is not ``test`` though the task is for
                evaluation only.
        """
        _check_part(part)
        if self.evaluation_only and part != "test":
            raise GliderError(
                f"task {self.name!r} is for evaluation only, so its {part} split must not be read; "
                "train and calibrate on other tasks"
            )
        if part not in self._read:
            examples = tuple(self.load(part))
            if not examples:
                raise GliderError(
                    f"task {self.name!r} has no examples in its {part} split; add some or leave it out"
                )
            self._read[part] = examples
        return list(self._read[part])

    def instruction(self, example: Example, part: str) -> str:
        """The wording that goes with an example, chosen by a hash of the example's id.

        Training and validation share the first half of the wordings, test alone has the second. Validation
        belongs to the first half because the threshold and the alphas are calibrated on it: calibration that
        had seen the test wordings would overstate how well unseen wordings are routed.
        """
        _check_part(part)
        if not self.instructions:
            return self.definition
        if len(self.instructions) == 1:
            return self.instructions[0]
        half = (len(self.instructions) + 1) // 2
        wordings = self.instructions[half:] if part == "test" else self.instructions[:half]
        return wordings[stable_hash(example.id) % len(wordings)]


def _check_part(part: str) -> None:
    if part not in PARTS:
        raise GliderError(f"there is no split {part!r}; use train, validation or test")
