"""Train many experts in one loop over one frozen base, each exactly as if it were trained alone.

One turn is one step of every expert in a slot. The rows of all of them share forwards and backwards; the loss is
``Σ_e Σ nll_e / N_e`` with N_e the target tokens of expert e in its own step, so that no expert's gradient depends
on who trains beside it. An expert that is done leaves its slot to the next one that waits.

Replicas take the same turns over the same slots, each with its part of the rows. A turn then sums the gradients of
the slots (each of R replicas sends ``2 (R-1)/R`` times their bytes) and the losses, so that all of them decide and
update alike.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch

from glider_dist.model.batch import Encoded
from glider_dist.parallel.replicas import SINGLE, Replicas
from glider_dist.training.adamw import StackedAdamW, all_finite, row_norms
from glider_dist.training.batches import MicroBatch, Packing, micro_batches
from glider_dist.training.runner import Runner
from glider_dist.training.trainee import Trainee
from glider_dist.training.unfinished import Unfinished


@dataclass(frozen=True)
class Turn:
    """What one turn did: the loss, gradient norm and learning rate of each expert that took a step."""

    losses: list[float]
    norms: list[float]
    rates: list[float]

    def means(self) -> dict[str, float]:
        """Over the experts, by name."""
        values = {"loss": self.losses, "grad_norm": self.norms, "learning_rate": self.rates}
        return {key: sum(found) / len(found) for key, found in values.items() if found}


class CoTraining:
    """The experts of one rank and its replicas: some in slots, others waiting."""

    def __init__(
        self,
        runner: Runner,
        trainees: Sequence[Trainee],
        packing: Packing,
        unfinished: Unfinished | None = None,
        replicas: Replicas = SINGLE,
        moments: str = "device",
    ):
        self.runner = runner
        self.replicas = replicas
        self.slots = runner.slots
        self.optimizer = StackedAdamW(self.slots.weights, host=moments == "host")
        self.packing = packing
        self.unfinished = unfinished
        # Neighbours in slots share forwards, so let them be of like length.
        self._waiting = sorted(trainees, key=lambda trainee: trainee.mean_length)
        self._active: dict[int, Trainee] = {}

    def run(
        self,
        retire: Callable[[Trainee, torch.Tensor], Any],
        on_turn: Callable[[Turn], Any] = lambda turn: None,
        stop: Callable[[], bool] = lambda: False,
    ) -> bool:
        """Train all of them, then take part in the other ranks' collectives until they are done, too.

        Args:
            retire: called, on the first of the replicas, with each expert that is done and its best row ``[n]``;
                in the background, if unfinished ones are kept, after those beside it have been written.
            stop: asked after each turn; if so, what is unfinished is kept and no further turn is taken.

        Returns:
            Whether all are done.
        """
        with warnings.catch_warnings():
            # Views of neighbouring rows are strided on purpose; their gradients have the same strides.
            warnings.filterwarnings("ignore", message="grad and param do not obey the gradient layout contract")
            try:
                kept = self.unfinished.choose(len(self.slots.names)) if self.unfinished else {}
                while self.fill(retire, kept):
                    on_turn(self.turn())
                    if self._after_turn(retire, bool(self._largest(int(stop())))):
                        break
                if self.unfinished:
                    self.unfinished.background.wait()
            finally:
                if self.unfinished:
                    self.unfinished.background.close()
            self.runner.finish()
        return not self._active and not self._waiting

    def _after_turn(self, retire: Callable[[Trainee, torch.Tensor], Any], stop: bool) -> bool:
        """Validate, keep and retire what is due; returns ``stop``."""
        for slot, trainee in self._active.items():
            if trainee.validates:
                trainee.validated(self.mean_loss(slot, trainee.validate), self.slots.weights[slot])
        done = {slot: trainee for slot, trainee in self._active.items() if trainee.done}
        work = [self._retiring(trainee, retire) for trainee in done.values()]
        if self.unfinished:
            if self.unfinished.due() or done or stop:
                self.unfinished.save(self._active, self.slots, self.optimizer, work)
        else:
            for each in work:
                each()
        for slot in done:
            # Not before the save, which has its best weights for a start that comes before the pool has them.
            self._active.pop(slot).release()
        return stop

    def _retiring(self, trainee: Trainee, retire: Callable[[Trainee, torch.Tensor], Any]) -> Callable[[], None]:
        row = self._result(trainee)

        def work() -> None:
            if not self.replicas.first:
                return
            retire(trainee, row)
            if self.unfinished:
                self.unfinished.files.remove(trainee.name)

        return work

    def fill(
        self,
        retire: Callable[[Trainee, torch.Tensor], Any] = lambda trainee, row: None,
        kept: Mapping[str, tuple[int, int | None]] = MappingProxyType({}),
    ) -> bool:
        """Give free slots to waiting experts, to those in ``kept`` their own first; returns whether any is used.

        Args:
            kept: by name, the step at which to go on and the slot, if it is to be a certain one.
        """
        for trainee in list(self._waiting):
            step, slot = kept.get(trainee.name, (0, None))
            if slot is not None and slot not in self._active:
                self._enter(slot, trainee, step, retire)
        for slot in range(len(self.slots.names)):
            while slot not in self._active and self._waiting:
                trainee = self._waiting[0]
                self._enter(slot, trainee, kept.get(trainee.name, (0, None))[0], retire)
        return bool(self._active)

    def _enter(
        self, slot: int, trainee: Trainee, step: int, retire: Callable[[Trainee, torch.Tensor], Any]
    ) -> None:
        self._waiting.remove(trainee)
        self.slots.enter(slot, trainee.name)
        self.optimizer.reset(slot)
        if self.unfinished and step:
            self.unfinished.load(step, slot, trainee, self.slots, self.optimizer)
        if trainee.done:
            # Its job ended between its last step and the pool. No replica has its file still to read.
            self._largest(0)
            self._retiring(trainee, retire)()
            trainee.release()
        else:
            self._active[slot] = trainee

    def turn(self) -> Turn:
        """One step of every expert in a slot."""
        chosen = {slot: trainee.draw() for slot, trainee in sorted(self._active.items())}
        # An expert that has just failed may fail again, and a forward that it shares spreads its NaN: zero weights
        # do not hide it from the others in grouped products.
        apart = {slot for slot, trainee in self._active.items() if trainee.progress.failing}
        losses, norms = self._gradients(chosen, apart)
        bad = {slot for slot in chosen if not all_finite([losses[slot], norms[slot]])}
        if bad - apart:
            # Find out who it was: once more, each by itself.
            losses, norms = self._gradients(chosen, set(chosen))
            bad = {slot for slot in chosen if not all_finite([losses[slot], norms[slot]])}
        updates = {
            slot: trainee.recipe.update(trainee.progress.step)
            for slot, trainee in self._active.items()
            if slot not in bad
        }
        self.optimizer.step(self.slots.weights, self.slots.grads, updates, norms)
        for slot, trainee in self._active.items():
            trainee.took(losses[slot], slot not in bad)
        rates = [update.learning_rate for update in updates.values()]
        return Turn(list(losses.values()), list(norms.values()), rates)

    def _gradients(
        self, chosen: Mapping[int, Sequence[Encoded]], apart: Collection[int]
    ) -> tuple[dict[int, float], dict[int, float]]:
        """Set the slots' gradients; returns each slot's loss and gradient norm."""
        targets = {slot: sum(len(item.answer) for item in items) for slot, items in chosen.items()}
        for slot in chosen:
            self.slots.grads[slot].zero_()

        def train(micro: MicroBatch) -> torch.Tensor:
            return self.runner.train(micro, [1 / targets[slot] for slot in micro.slots])

        nll = self._nll(chosen, apart, train)
        # With those of slots between them that are idle, which nobody reads.
        self.replicas.sum(self.slots.grads[min(chosen) : max(chosen) + 1])
        losses = {slot: value / targets[slot] for slot, value in nll.items()}
        return losses, row_norms(self.slots.grads, list(chosen))

    def _nll(
        self,
        chosen: Mapping[int, Sequence[Encoded]],
        apart: Collection[int],
        run: Callable[[MicroBatch], torch.Tensor],
    ) -> dict[int, float]:
        """Run the forwards of these rows, the replicas their parts; returns each slot's nll over all of them."""
        mine = {slot: self.replicas.part(items, slot) for slot, items in chosen.items()}
        micros = micro_batches({slot: items for slot, items in mine.items() if items}, self.packing, apart)
        # Before the sums, as a sharded base may need this rank in the forwards of one that has more of them.
        more = self._largest(len(micros)) - len(micros) if self.runner.frozen.lockstep else 0
        found = [run(micro) for micro in micros]
        for _ in range(more):
            self.runner.idle()
        nll = dict.fromkeys(chosen, 0.0)
        if found:
            # One host sync for all micro-batches.
            values = torch.cat(found).tolist()
            for slot, value in zip((s for micro in micros for s in micro.slots), values, strict=True):
                nll[slot] += value
        if self.replicas.count > 1:
            summed = torch.tensor(list(nll.values()), dtype=torch.float64, device=self.slots.grads.device)
            nll = dict(zip(nll, self.replicas.sum(summed).tolist(), strict=True))
        return nll

    def _largest(self, value: int) -> int:
        return self.replicas.largest(value, self.slots.grads.device)

    def mean_loss(self, slot: int, examples: Sequence[Encoded]) -> float:
        """Nats per target token of one slot's expert over ``examples``, by itself."""
        nll = self._nll({slot: examples}, (), self.runner.score)
        return nll[slot] / sum(len(item.answer) for item in examples)

    def _result(self, trainee: Trainee) -> torch.Tensor:
        if trainee.best is not None:
            return trainee.best
        # Never validated to a finite loss: an expert that changes nothing.
        return self.slots.weights.new_zeros(self.slots.weights.shape[1], device="cpu")
