"""The loop of joint training: a step of the whole job, validation, and what is kept of the best weights.

The loss on a rank is ``W (Σ nll / N + router losses)`` with N the target tokens of the step's global batch and W
the number of ranks, by which DeepSpeed divides: the gradient is that of the mean over the batch, however it is
cut.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from glider_dist.errors import GliderError
from glider_dist.model.attach import context_of
from glider_dist.model.batch import Collator, target_nll
from glider_dist.parallel.guards import check_gradients
from glider_dist.training.batches import Packing
from glider_dist.training.deepspeed_moe import ExpertEngine
from glider_dist.training.joint_batches import Row, micro_batches
from glider_dist.training.joint_params import Trained
from glider_dist.training.joint_routing import RouterExtras, shares_of
from glider_dist.training.trainee import Recipe

Scope = Callable[[Sequence[Row]], AbstractContextManager[Any]]
"""Given a micro-batch, the context that routes it."""


@dataclass(frozen=True)
class Step:
    """What one step did, over the whole job: nats per target token, router losses, and the gradient's norm."""

    number: int
    loss: float
    router_loss: float
    norm: float
    rates: dict[str, float]


@dataclass
class Progress:
    """How far the training has come. All of it is the same on every rank.

    Attributes:
        step: steps taken.
        validation: (step, nats per target token); step 0 is before training.
        tokens: trained on by the whole job, padding excluded.
    """

    step: int = 0
    validation: list[tuple[int, float]] = field(default_factory=list)
    tokens: int = 0

    @property
    def best(self) -> tuple[int, float]:
        """The best validation so far, the first of equals."""
        return min(self.validation, key=lambda point: point[1])


class JointLoop:
    """Trains the values of ``engine`` through the model.

    Args:
        model: the base with the experts of ``trained`` attached.
        scope: routes a micro-batch; entered around its forward and backward.
        recipes: by kind, ``experts`` and ``gates``; both have the same steps.
        extras: what is added to the routers.
    """

    def __init__(
        self,
        model: Any,
        collator: Collator,
        engine: ExpertEngine,
        trained: Trained,
        scope: Scope,
        recipes: dict[str, Recipe],
        packing: Packing,
        extras: RouterExtras,
    ):
        self.model = model
        self.collator = collator
        self.engine = engine
        self.trained = trained
        self.scope = scope
        self.recipes = recipes
        self.packing = packing
        self.extras = extras
        self.progress = Progress()
        self.world, self.rank = dist.get_world_size(), dist.get_rank()
        self._context = context_of(model)
        self._context.watch = extras if extras.watches else None
        # A single expert serves every token, uncounted, and there is no other whose gradient it could get.
        self._checked = not trained.experts or len(trained.names) == 1

    def run(
        self, batches: Iterable[list[Row]], after: Callable[[Step], bool], ask: Callable[[list[Row]], None]
    ) -> None:
        """Take a step for each batch.

        Args:
            batches: global batches, the same on every rank.
            after: called after each step; True ends the run. All ranks must return the same.
            ask: called with this rank's rows of the batch that comes next, before they are needed.
        """
        waiting = iter(batches)
        batch = next(waiting, None)
        while batch is not None:
            following = next(waiting, None)
            micros = self._mine(batch)
            if following is not None:
                ask([row for micro in self._mine(following) for row in micro])
            step = self.step(batch, micros)
            if after(step):
                return
            batch = following

    def _mine(self, batch: list[Row]) -> list[list[Row]]:
        return micro_batches(batch, self.world, self.packing)[self.rank]

    def step(self, batch: list[Row], micros: list[list[Row]] | None = None) -> Step:
        """One update from a global batch.

        Raises:
            GliderError: on all ranks, if the loss or the gradient is not finite; in the first step also on a rank
                that got a gradient for an expert without tokens.
        """
        number = self.progress.step + 1
        micros = self._mine(batch) if micros is None else micros
        targets = sum(len(row.encoded.answer) for row in batch)
        tokens = sum(len(row.encoded) for row in batch)
        sums = torch.zeros(2, dtype=torch.float64, device=self.collator.device)
        self._context.counts.clear()
        for place, rows in enumerate(micros):
            self.trained.bind(self.engine.values())
            self.extras.begin(number, rows)
            with self.scope(rows), self._idle(not rows):
                nll = self._nll(rows) / targets
                added = self.extras.loss(tokens)
                loss = nll if added is None else nll + added
                # In here, as recomputed layers must route as they did.
                self.engine.backward(self.world * loss, last=place == len(micros) - 1)
            sums += torch.stack(
                [nll.detach(), torch.zeros_like(nll) if added is None else added.detach()]
            ).double()
        dist.all_reduce(sums)
        total, router_loss = sums.tolist()
        rates = {kind: recipe.update(number).learning_rate for kind, recipe in self.recipes.items()}
        _check_finite("loss", total + router_loss, number)
        if not self._checked:
            self._check_gradients()
            self._checked = True
        norm = self.engine.step(rates)
        _check_finite("gradient", norm, number)
        self._note_loads()
        self.progress.step = number
        self.progress.tokens += tokens
        return Step(number, total, router_loss, norm, rates)

    @contextlib.contextmanager
    def _idle(self, idle: bool) -> Iterator[None]:
        """Take all tokens for padding: a forward and backward for the other ranks' collectives alone."""
        self._context.stacks.idle = idle
        try:
            yield
        finally:
            self._context.stacks.idle = False

    def _nll(self, rows: list[Row]) -> torch.Tensor:
        """The sum over the rows' targets; 0 without rows."""
        if not rows:
            return target_nll(self.model, self.collator.dummy()).sum() * 0.0
        return target_nll(self.model, self.collator.batch([row.encoded for row in rows])).sum()

    @torch.no_grad()
    def validate(self, rows: list[Row]) -> float:
        """Nats per target token over ``rows``, which all ranks share, with the present weights; noted."""
        self.trained.bind(self.engine.values())
        total = torch.zeros((), dtype=torch.float64, device=self.collator.device)
        for micro in self._mine(rows):
            self.extras.begin(0, [])
            with self.scope(micro), self._idle(not micro):
                total += self._nll(micro).double()
        dist.all_reduce(total)
        loss = float(total) / sum(len(row.encoded.answer) for row in rows)
        self.progress.validation.append((self.progress.step, loss))
        return loss

    def _check_gradients(self) -> None:
        """As DeepSpeed has summed them over the replicas; in the first step alone, as it reads them all."""
        counts = self._context.counts
        sites = [key.removesuffix(".B") for key in self.trained.experts if key.endswith(".B")]
        none = torch.zeros(len(self._context.names), dtype=torch.int64, device=self.collator.device)
        tokens_SE = torch.stack([counts.get(site, none) for site in sites])
        dist.all_reduce(tokens_SE)
        own = list(self.trained.own)
        norms = [self.engine.gradient(f"{site}.B").flatten(1).norm(dim=1)[: len(own)] for site in sites]
        names = [self._context.names[expert] for expert in own]
        # Gradients may be in host memory, with their optimizer.
        check_gradients(names, sites, torch.stack(norms).to(tokens_SE.device), tokens_SE[:, own])

    def _note_loads(self) -> None:
        if not self.extras.joint.balance_loss:
            return
        counts = dict(self._context.counts)
        if counts:
            everyone = torch.stack([counts[site] for site in counts])
            dist.all_reduce(everyone)
            counts = dict(zip(counts, everyone.unbind(), strict=True))
        self.extras.loads = shares_of(counts)


def _check_finite(what: str, value: float, step: int) -> None:
    if not math.isfinite(value):
        raise GliderError(
            f"the {what} is not finite in step {step}; the pool is as it was: lower train.learning_rate and "
            "train.gate_learning_rate, and delete checkpoints/joint of the run, which is of these rates"
        )
