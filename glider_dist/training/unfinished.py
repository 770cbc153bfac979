"""Experts in training, kept on disk now and then, so that a job that ended early goes on where it was.

Each expert has checkpoint files of its own, so that a job with another number of ranks can take it up. Weights,
moments and counts are all that there is: the data order follows from seed and name. The experts that a rank trains
side by side are saved together and know of each other: a job with as many ranks puts them into the same slots at
the same steps, so that forwards are shared as before and the result is the same to the last bit.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from glider_dist.errors import GliderError
from glider_dist.model.batch import Encoded
from glider_dist.parallel.replicas import SINGLE, Replicas
from glider_dist.training.adamw import StackedAdamW
from glider_dist.training.background import Background
from glider_dist.training.checkpoint import Checkpoints, Damaged
from glider_dist.training.slots import Slots
from glider_dist.training.trainee import Progress, Trainee

log = logging.getLogger(__name__)
Facts = dict[str, str]
"""What an expert's training depends on: by a name that a user knows, a value or its digest."""


def digest(value: Any) -> str:
    """Of a value with a faithful ``repr``."""
    return hashlib.sha256(repr(value).encode()).hexdigest()


def facts_of(trainee: Trainee, **more: str) -> Facts:
    """``more`` comes first, as a change of the tasks' files changes what is made of them, too."""
    recipe = {f"{key} of its recipe": str(value) for key, value in asdict(trainee.recipe).items()}
    examples = {"train": trainee.train, "validation": trainee.validate}
    return {**more, **recipe, **{f"its {part} tokens": _tokens(items) for part, items in examples.items()}}


def _tokens(items: Iterable[Encoded]) -> str:
    found = hashlib.sha256()
    for item in items:
        found.update(repr((item.prompt, item.answer)).encode())
    return found.hexdigest()


@dataclass(frozen=True)
class Interval:
    """How often to save: whichever comes first."""

    steps: int
    minutes: float


class Unfinished:
    """The unfinished experts of one kind, as one rank sees them.

    Attributes:
        facts: by name, of every expert that this rank trains.
        replicas: who trains them with this rank; the first of them writes.
        turn: steps of this kind of training so far, those of earlier starts included.
    """

    def __init__(
        self, files: Checkpoints, facts: Mapping[str, Facts], interval: Interval, replicas: Replicas = SINGLE
    ):
        self.files = files
        self.facts = facts
        self.replicas = replicas
        self.interval = interval
        self.background = Background()
        self.turn = self._saved = 0
        self._last = time.monotonic()

    @property
    def _place(self) -> list[int]:
        return [self.replicas.team, self.replicas.teams]

    def due(self) -> bool:
        """Ask after every turn. Raises GliderError if an earlier save has failed."""
        self.background.check()
        self.turn += 1
        if not self.replicas.first:
            return False
        late = time.monotonic() - self._last >= 60 * self.interval.minutes
        return (late or self.turn - self._saved >= self.interval.steps) and not self.background.busy

    def save(
        self,
        active: Mapping[int, Trainee],
        slots: Slots,
        optimizer: StackedAdamW,
        then: Sequence[Callable[[], Any]] = (),
    ) -> None:
        """Copy every expert that is in a slot, and write the copies in the background, ``then`` do that."""
        if not self.replicas.first:
            return
        beside = {trainee.name: [slot, trainee.progress.step] for slot, trainee in active.items()}
        writes = [self._write(slot, trainee, beside, slots, optimizer) for slot, trainee in sorted(active.items())]
        self.background.submit(*writes, *then)
        self._saved, self._last = self.turn, time.monotonic()

    def _write(
        self, slot: int, trainee: Trainee, beside: dict[str, list[int]], slots: Slots, optimizer: StackedAdamW
    ) -> Callable[[], None]:
        rows = {
            "weights": slots.weights[slot],
            "mean": optimizer.mean[slot],
            "square": optimizer.square[slot],
            "updates": optimizer.steps[slot],
        }
        tensors = {key: row.detach().to("cpu", copy=True) for key, row in rows.items()}
        if trainee.best is not None:
            tensors["best"] = trainee.best
        step = trainee.progress.step
        record = {
            "facts": self.facts[trainee.name],
            # Serialised now: the lists in it go on growing.
            "progress": json.dumps(asdict(trainee.progress)),
            "place": self._place,
            "turn": self.turn,
            "beside": beside,
        }
        return lambda: self.files.write(trainee.name, step, tensors, record)

    def check(self) -> None:
        """Look at what is there for this rank's experts, before any of them trains.

        Raises:
            GliderError: a checkpoint cannot be read, or something that the training depends on has changed since.
        """
        for name, now in self.facts.items():
            for step in self.files.steps(name):
                try:
                    before = self.files.record(name, step).get("facts", {})
                except Damaged:
                    continue
                if said := what_changed(repr(name), step, before, now, self.files.folder / name):
                    raise GliderError(said)
                break

    def choose(self, slots: int) -> dict[str, tuple[int, int | None]]:
        """The step at which each expert goes on, and its slot if it is to have a certain one.

        If these ranks of a job with as many saved experts side by side, and no other job since, these; else each
        its newest good file.
        """
        good: dict[tuple[str, int], bool] = {}

        def is_good(name: str, step: int) -> bool:
            if (name, step) not in good:
                good[name, step] = self._good(name, step)
            return good[name, step]

        sets: list[tuple[int, list[Any]]] = []
        here, elsewhere = [0], [0]
        chosen: dict[str, tuple[int, int | None]] = {}
        for name in self.facts:
            steps = [step for step in self.files.steps(name) if is_good(name, step)]
            if steps:
                chosen[name] = (steps[0], None)
            elif self.files.steps(name):
                log.warning("no checkpoint of %s is good; its training starts anew", name)
            for record in (self.files.record(name, step) for step in steps):
                (here if record["place"] == self._place else elsewhere).append(record["turn"])
                beside = {other: place for other, place in record["beside"].items() if other in self.facts}
                if record["place"] == self._place and all(is_good(other, at) for other, (_, at) in beside.items()):
                    sets.append((record["turn"], sorted(beside.items())))
        # Turns go on counting whoever counted before, so that a later save has the larger number on any ranks.
        self.turn = self._saved = max(here + elsewhere)
        if sets and (newest := max(sets))[0] > max(elsewhere):
            _, latest = newest
            chosen |= {name: (step, slot if slot < slots else None) for name, (slot, step) in latest}
        return chosen

    def _good(self, name: str, step: int) -> bool:
        if step not in self.files.steps(name):
            return False
        try:
            self.files.read(name, step)
        except Damaged as error:
            older = [other for other in self.files.steps(name) if other < step]
            log.warning("%s; %s", error, f"step {older[0]} is tried" if older else "there is no older one")
            return False
        return True

    def load(self, step: int, slot: int, trainee: Trainee, slots: Slots, optimizer: StackedAdamW) -> None:
        """Go on with an expert that has just entered a slot."""
        part = self.files.read(trainee.name, step)
        with torch.no_grad():
            slots.weights[slot].copy_(part.tensors["weights"])
            optimizer.mean[slot].copy_(part.tensors["mean"])
            optimizer.square[slot].copy_(part.tensors["square"])
            optimizer.steps[slot].copy_(part.tensors["updates"])
        trainee.resume(Progress(**json.loads(part.record["progress"])), part.tensors.get("best"))
        log.info("%s goes on after step %d", trainee.name, trainee.progress.step)


def what_changed(whose: str, step: int, before: Facts, now: Facts, folder: Path) -> str:
    """A sentence about the first fact that differs between a checkpoint and now, or ""."""
    changed = [key for key in {**now, **before} if now.get(key) != before.get(key)]
    if not changed:
        return ""
    values = before.get(changed[0], "nothing"), now.get(changed[0], "nothing")
    # Digests say nothing to a reader.
    how = f" from {values[0]} to {values[1]}" if max(map(len, values)) < 40 else ""
    return (
        f"{changed[0]} changed{how} since the checkpoint of {whose} at step {step}; change it back to go on, "
        f"or delete {folder} to start it anew"
    )
