"""Fit the parameters of one expert (or one gate) on one task, over the frozen base."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from glider_dist.config import TrainConfig
from glider_dist.model.attach import assign_experts
from glider_dist.model.batch import Batch, Collator, Encoded, target_nll
from glider_dist.model.engine import BACKWARD, FORWARD, IDLE, FrozenBase
from glider_dist.training.order import step_indices


@dataclass(frozen=True)
class Recipe:
    """How long and how fast one expert trains; the published values are the defaults of TrainConfig."""

    steps: int
    batch_size: int
    learning_rate: float
    seed: int
    train: TrainConfig


@dataclass
class Fitted:
    """What came of it. ``validation`` holds (step, nats per target token)."""

    parameters: list[torch.Tensor]
    best_step: int
    validation: list[tuple[int, float]]
    losses: list[float] = field(default_factory=list)
    tokens: int = 0
    padding: int = 0
    seconds: float = 0.0


class Runner:
    """Runs one rank's training and validation forwards, in step with the other ranks if the base is sharded."""

    def __init__(self, frozen: FrozenBase, collator: Collator, parameters: Sequence[torch.Tensor]):
        self.frozen = frozen
        self.collator = collator
        self.parameters = parameters

    def train(self, batch: Batch, total_targets: int) -> float:
        """Add the gradient of ``Σ nll / total_targets``; returns the summed nll of the batch."""
        self.frozen.turn(BACKWARD)
        return float(self._nll(batch, weight=1.0 / total_targets).sum())

    def score(self, batch: Batch) -> torch.Tensor:
        """Nll per row ``[B]`` without a gradient."""
        kind = self.frozen.turn(FORWARD)
        return self._forward_as(kind, batch)

    def finish(self) -> None:
        """Take part in the other ranks' collectives until they are done, too."""

        def dummy(kind: int) -> None:
            self._forward_as(kind, self.collator.dummy())

        self.frozen.drain(dummy)

    def _forward_as(self, kind: int, batch: Batch) -> torch.Tensor:
        if kind == BACKWARD:
            # Some rank trains now: this one joins its backward with a gradient of zero.
            return self._nll(batch, weight=0.0)
        assert kind != IDLE
        with torch.no_grad():
            return self._nll(batch)

    def _nll(self, batch: Batch, weight: float | None = None) -> torch.Tensor:
        """Nll per row ``[B]``; with a weight, the gradient of ``weight * Σ nll`` is added."""
        only = torch.zeros(batch.labels.shape[0], dtype=torch.int64)
        with assign_experts(self.frozen.model, only):
            nll = target_nll(self.frozen.model, batch)
            if weight is not None:
                # In here, as checkpointed layers run again in the backward and must find their expert.
                (nll.sum() * weight).backward()
        return nll.detach()


def fit(
    runner: Runner,
    name: str,
    train: Sequence[Encoded],
    validation: Sequence[Encoded],
    recipe: Recipe,
    on_step: Callable[[dict[str, float]], Any] = lambda values: None,
) -> Fitted:
    """AdamW with linear warm-up, then a constant rate; the best validated parameters are kept.

    The parameters of ``runner`` are changed in place. The loss of a step is the mean over its target tokens.
    """
    config = recipe.train
    parameters = list(runner.parameters)
    optimizer = torch.optim.AdamW(
        parameters, lr=recipe.learning_rate, weight_decay=config.weight_decay, eps=1e-8, foreach=True
    )
    warmup = max(1, round(recipe.steps * config.warmup_ratio))
    micro = config.micro_batch_size or recipe.batch_size
    result = Fitted([], 0, [])
    best = math.inf
    started = time.perf_counter()
    for step, indices in enumerate(
        step_indices(recipe.seed, name, len(train), recipe.batch_size, recipe.steps), 1
    ):
        rate = recipe.learning_rate * min(1.0, step / warmup)
        for group in optimizer.param_groups:
            group["lr"] = rate
        # Rows of like length side by side, so that micro-batches carry little padding.
        chosen = sorted((train[i] for i in indices), key=len)
        total = sum(len(item.answer) for item in chosen)
        nll = 0.0
        for start in range(0, len(chosen), micro):
            batch = runner.collator.batch(chosen[start : start + micro])
            nll += runner.train(batch, total)
            result.tokens += sum(map(len, chosen[start : start + micro]))
            result.padding += batch.tokens - sum(map(len, chosen[start : start + micro]))
        norm = 0.0
        if config.max_grad_norm:
            norm = float(torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm, foreach=True))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        result.losses.append(nll / total)
        on_step({"loss": nll / total, "learning_rate": rate, "grad_norm": norm})
        if step % config.eval_every == 0 or step == recipe.steps:
            loss = mean_loss(runner, validation, recipe.batch_size)
            result.validation.append((step, loss))
            if loss < best or not result.parameters:
                best, result.best_step = loss, step
                result.parameters = [parameter.detach().clone() for parameter in parameters]
    result.seconds = time.perf_counter() - started
    return result


def mean_loss(runner: Runner, examples: Sequence[Encoded], batch_size: int) -> float:
    """Nats per target token over ``examples``."""
    ordered = sorted(examples, key=len)
    nll, targets = 0.0, 0
    for start in range(0, len(ordered), batch_size):
        chosen = ordered[start : start + batch_size]
        nll += float(runner.score(runner.collator.batch(chosen)).sum())
        targets += sum(len(item.answer) for item in chosen)
    return nll / targets
