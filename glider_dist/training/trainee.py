"""One expert's own training: its data order, schedule, validations and best weights, whoever trains beside it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
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
    patience: int | None
    max_failures: int
    eval_examples: int

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
            patience=train.patience,
            max_failures=train.max_failures,
            eval_examples=train.eval_examples,
        )

    def update(self, step: int) -> Update:
        """Step 1 is the first: linear warm-up, then a constant rate."""
        warmup = max(1, round(self.steps * self.warmup_ratio))
        rate = self.learning_rate * min(1.0, step / warmup)
        return Update(rate, self.weight_decay, self.max_grad_norm)


@dataclass
class Progress:
    """How far an expert has come.

    Attributes:
        step: steps taken; skipped ones count.
        losses: nats per target token of each step.
        validation: (step, nats per target token).
        best_step: when the best validated weights were; 0 until there are any.
        skipped: steps without an update, as the loss or the gradient was not finite; ``failing`` of them in a row.
        unimproved: validations since the best.
        tokens: of its training rows, padding excluded.
        stopped: why it ended early without having converged, or "".
    """

    step: int = 0
    losses: list[float] = field(default_factory=list)
    validation: list[tuple[int, float]] = field(default_factory=list)
    best_step: int = 0
    skipped: int = 0
    failing: int = 0
    unimproved: int = 0
    tokens: int = 0
    stopped: str = ""

    @property
    def best_loss(self) -> float:
        """Nats per target token of the best validation; NaN if there is none."""
        return dict(self.validation).get(self.best_step, math.nan)


class Trainee:
    """An expert in training. What happens to it follows from its own data and recipe alone.

    Attributes:
        best: row ``[n]`` of the best validated weights on the CPU; None until there are any.
    """

    def __init__(self, name: str, train: Sequence[Encoded], validate: Sequence[Encoded], recipe: Recipe):
        self.name = name
        self.train = train
        self.validate = validate
        self.recipe = recipe
        self.progress = Progress()
        self.best: torch.Tensor | None = None
        self._validation_examples = len(validate)
        self._order = step_indices(recipe.seed, name, len(train), recipe.batch_size, recipe.steps)

    @property
    def mean_length(self) -> float:
        """Tokens per training example."""
        return sum(map(len, self.train)) / len(self.train)

    @property
    def cost(self) -> float:
        """Tokens that its whole training takes, expected."""
        return self.mean_length * self.recipe.batch_size * self.recipe.steps

    @property
    def done(self) -> bool:
        progress, recipe = self.progress, self.recipe
        converged = recipe.patience is not None and progress.unimproved >= recipe.patience
        return progress.step >= recipe.steps or converged or bool(progress.stopped)

    @property
    def validates(self) -> bool:
        """Whether a validation follows the step just taken."""
        step = self.progress.step
        return not self.progress.stopped and (step % self.recipe.eval_every == 0 or step == self.recipe.steps)

    def resume(self, progress: Progress, best: torch.Tensor | None) -> None:
        """Go on after the steps of ``progress``."""
        self.progress, self.best = progress, best
        self._order = islice(self._order, progress.step, None)

    def draw(self) -> list[Encoded]:
        """The rows of the next step."""
        rows = [self.train[index] for index in next(self._order)]
        self.progress.step += 1
        self.progress.tokens += sum(map(len, rows))
        return rows

    def took(self, loss: float, applied: bool) -> None:
        """Note the loss of the step just drawn, and whether it was finite and its update applied."""
        progress = self.progress
        progress.losses.append(loss)
        progress.failing = 0 if applied else progress.failing + 1
        progress.skipped += not applied
        if progress.failing >= self.recipe.max_failures:
            progress.stopped = (
                f"the loss or its gradient was not finite in {progress.failing} steps in a row, "
                f"up to step {progress.step}"
            )

    def validated(self, loss: float, row: torch.Tensor) -> None:
        """Note a validation of the weights ``row [n]``; they are copied if they are the best so far."""
        progress = self.progress
        better = math.isfinite(loss) and not loss >= progress.best_loss
        progress.validation.append((progress.step, loss))
        progress.unimproved = 0 if better else progress.unimproved + 1
        if better:
            progress.best_step = progress.step
            self.best = row.detach().to("cpu", copy=True)

    def release(self) -> None:
        """Let weights and examples go when the expert is done; what is reported of it stays."""
        self.best, self.train, self.validate = None, (), ()

    def record(self) -> dict[str, Any]:
        """What its card says about the training."""
        recipe, progress = self.recipe, self.progress
        found: dict[str, Any] = {
            "seed": recipe.seed,
            "steps": progress.step,
            "batch_size": recipe.batch_size,
            "learning_rate": recipe.learning_rate,
            "best_step": progress.best_step,
            "validation_examples": self._validation_examples,
            "validation": [[step, round(loss, 6)] for step, loss in progress.validation],
            "tokens": progress.tokens,
        }
        if progress.skipped:
            found["skipped_steps"] = progress.skipped
        if progress.stopped:
            found["stopped"] = progress.stopped
        return found
