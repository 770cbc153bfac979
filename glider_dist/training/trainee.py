"""One expert's own training: its data order, schedule, validations and best weights, whoever trains beside it."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from glider_dist.config import TrainConfig
from glider_dist.model.batch import Encoded
from glider_dist.training.adamw import Update
from glider_dist.training.order import step_indices


@dataclass(frozen=True)
class Recipe:
    """How long and how fast one expert (or gate) trains; the published values are the defaults of TrainConfig."""

    steps: int
    batch_size: int
    learning_rate: float
    seed: int
    weight_decay: float
    warmup_ratio: float
    max_grad_norm: float
    eval_every: int

    @staticmethod
    def of(train: TrainConfig, seed: int, gate: bool = False) -> Recipe:
        return Recipe(
            steps=train.gate_steps if gate else train.max_steps,
            batch_size=(train.gate_batch_size if gate else None) or train.batch_size,
            learning_rate=train.gate_learning_rate if gate else train.learning_rate,
            seed=seed,
            weight_decay=train.weight_decay,
            warmup_ratio=train.warmup_ratio,
            max_grad_norm=train.max_grad_norm,
            eval_every=train.eval_every,
        )

    def update(self, step: int) -> Update:
        """Step 1 is the first: linear warm-up, then a constant rate."""
        warmup = max(1, round(self.steps * self.warmup_ratio))
        rate = self.learning_rate * min(1.0, step / warmup)
        return Update(rate, self.weight_decay, self.max_grad_norm)


@dataclass
class Trainee:
    """An expert in training. What happens to it follows from its own data and recipe alone.

    Attributes:
        step: steps taken; skipped ones count.
        losses: nats per target token of each step.
        validation: (step, nats per target token).
        best: row ``[n]`` of the best validated weights on the CPU; None until there are any.
        skipped: steps without an update, as the loss or the gradient was not finite; ``failing`` of them in a row.
        stopped: why it ended early, or "".
        tokens: of its training rows, padding excluded.
    """

    name: str
    train: Sequence[Encoded]
    validate: Sequence[Encoded]
    recipe: Recipe
    step: int = 0
    losses: list[float] = field(default_factory=list)
    validation: list[tuple[int, float]] = field(default_factory=list)
    best: torch.Tensor | None = None
    best_step: int = 0
    skipped: int = 0
    failing: int = 0
    stopped: str = ""
    tokens: int = 0
    started: float = 0.0

    def __post_init__(self) -> None:
        recipe = self.recipe
        self._order = step_indices(recipe.seed, self.name, len(self.train), recipe.batch_size, recipe.steps)

    @property
    def cost(self) -> float:
        """Tokens that its whole training takes, expected."""
        mean = sum(map(len, self.train)) / len(self.train)
        return mean * self.recipe.batch_size * self.recipe.steps

    @property
    def done(self) -> bool:
        return self.step >= self.recipe.steps or bool(self.stopped)

    @property
    def validates(self) -> bool:
        """Whether a validation follows the step just taken."""
        return self.step % self.recipe.eval_every == 0 or self.step == self.recipe.steps

    @property
    def best_loss(self) -> float:
        return dict(self.validation).get(self.best_step, math.nan)

    def start(self) -> Trainee:
        self.started = time.perf_counter()
        return self

    def draw(self) -> list[Encoded]:
        """The rows of the next step."""
        rows = [self.train[index] for index in next(self._order)]
        self.step += 1
        self.tokens += sum(map(len, rows))
        return rows

    def took(self, loss: float, applied: bool, most_failures: int) -> None:
        """Note the step just drawn; ``most_failures`` skipped in a row end the training."""
        self.losses.append(loss)
        self.failing = 0 if applied else self.failing + 1
        self.skipped += not applied
        if self.failing >= most_failures:
            self.stopped = (
                f"the loss or its gradient was not finite in {self.failing} steps in a row, up to step {self.step}"
            )

    def validated(self, loss: float, row: torch.Tensor) -> None:
        """Note a validation of the weights ``row [n]``; they are copied if they are the best so far."""
        better = math.isfinite(loss) and not loss >= self.best_loss
        self.validation.append((self.step, loss))
        if better:
            self.best_step = self.step
            self.best = row.detach().to("cpu", copy=True)

    def record(self) -> dict[str, Any]:
        """What its card says about the training."""
        recipe = self.recipe
        found: dict[str, Any] = {
            "seed": recipe.seed,
            "steps": recipe.steps,
            "batch_size": recipe.batch_size,
            "learning_rate": recipe.learning_rate,
            "best_step": self.best_step,
            "validation": [[step, round(loss, 6)] for step, loss in self.validation],
            "tokens": self.tokens,
            "seconds": round(time.perf_counter() - self.started, 2),
        }
        if self.skipped:
            found["skipped_steps"] = self.skipped
        if self.stopped:
            found["stopped"] = self.stopped
        return found
