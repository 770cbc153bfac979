"""Joint training kept on disk: a file for each expert and one for what the job shares, which any world can read.

    run_dir/checkpoints/joint/experts/NAME/    weights, moments and best weights of an expert (``joint_state``)
    run_dir/checkpoints/joint/job/             progress and the routers' loads

The data order follows from the seed and what is drawn at random from seed and step, so the step says it all.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from glider_dist.errors import GliderError
from glider_dist.job import Job
from glider_dist.pool.files import remove_folder
from glider_dist.training.background import Background
from glider_dist.training.checkpoint import Damaged
from glider_dist.training.deepspeed_moe import MOMENTS, ExpertEngine
from glider_dist.training.joint_loop import JointLoop, Progress
from glider_dist.training.joint_params import Trained
from glider_dist.training.joint_state import Tensors, gather_state, load_state
from glider_dist.training.unfinished import Facts, what_changed

log = logging.getLogger(__name__)
_BEST, _JOB = "best/", "job"


class JointKeeper:
    """Saves and restores one joint training. All ranks make it and call it together.

    Args:
        facts: what the training depends on, and the world not.

    Attributes:
        writes: whether this rank writes the experts that it owns; of replicas, which own the same, the first does.
    """

    def __init__(self, job: Job, engine: ExpertEngine, trained: Trained, loop: JointLoop, facts: Facts):
        train = job.cfg.train
        self.job, self.engine, self.trained, self.loop, self.facts = job, engine, trained, loop, facts
        # The ranks write side by side: while one deletes its oldest file another may still need it.
        keep = max(2, train.keep_last)
        self.shared, self.experts = job.checkpoints("joint", keep), job.checkpoints("joint/experts", keep)
        self.background = Background()
        self.stopped = False
        self._steps, self._seconds = train.save_steps, 60 * train.save_minutes
        self._last = (0, time.monotonic())
        self.writes = job.mesh is None or job.mesh.rank == job.mesh.replica_ranks[0]
        self._given_up_after: int | None = 0

    def restore(self) -> dict[str, Tensors] | None:
        """Go on after the newest step of which all files are good, if there is any.

        Returns:
            The best weights so far of the experts that this rank writes, or None.

        Raises:
            GliderError: on all ranks, if what the training depends on has changed.
        """
        self._given_up_after = step = self._newest()
        if not step:
            return None
        shared = self.shared.read(_JOB, step)
        self.job.ranks.on_main(lambda: self._check(step, shared.record["facts"]))
        own = {self.trained.names[expert] for expert in self.trained.own}

        def of_use(key: str) -> bool:
            return self.writes or not key.startswith(_BEST)

        kept = {name: self.experts.some(name, step, of_use) for name in own}
        # Of the others' experts every rank needs the gates; their owners have checked the files.
        rest = [self.trained.names[expert] for expert in self.trained.chosen]
        kept |= {name: self.experts.some(name, step, is_gate) for name in rest if name not in own}
        load_state(self.engine, self.trained, kept.__getitem__)
        self.engine.steps = int(shared.record["updates"])
        progress = dict(shared.record["progress"])
        progress["validation"] = [(at, loss) for at, loss in progress["validation"]]
        self.loop.progress = Progress(**progress)
        self.loop.extras.loads = shared.tensors
        self._last = (step, time.monotonic())
        if self.job.ranks.is_main:
            log.info("joint training goes on after step %d", step)
        best = {name: _with_prefix(kept[name], _BEST) for name in (own if self.writes else ())}
        return best if shared.record["best"] else None

    def _newest(self) -> int:
        """The same on all ranks: each looks at the files of its own experts."""
        found = self.job.ranks.gather(self.job.ranks.together(self._good))
        common = set.intersection(*(steps for _, steps, _ in found))
        said = sorted({text for _, _, problems in found for text in problems})
        if not said and not common and any(there for there, _, _ in found):
            said = [f"no step in {self.shared.folder} has the files of all experts and of the job"]
        for problem in said if self.job.ranks.is_main else ():
            older = f"step {max(common)} is used" if common else "the training starts anew"
            log.warning("%s; %s", problem, older)
        return max(common, default=0)

    def _good(self) -> tuple[bool, set[int], list[str]]:
        """Whether any file is there, the steps of which all of this rank's files are good, and what is wrong with
        others, a sentence each."""
        names = [self.trained.names[expert] for expert in self.trained.own]
        parts = [(self.shared, _JOB), *((self.experts, name) for name in names)]
        steps = [set(files.steps(name)) for files, name in parts]
        good = set.intersection(*steps)
        problems: list[str] = []
        for files, name in parts:
            for step in sorted(good):
                try:
                    files.read(name, step)
                except Damaged as error:
                    good.discard(step)
                    problems.append(str(error))
        return any(steps), good, problems

    def _check(self, step: int, before: Facts) -> None:
        if said := what_changed("joint training", step, before, self.facts, self.shared.folder):
            raise GliderError(said)

    def after_step(self, best: Mapping[str, Tensors] | None) -> bool:
        """Save if it is time; returns whether the job stops, with everything saved. A collective.

        Raises:
            GliderError: on all ranks, if one of them could not write.
        """
        step = self.loop.progress.step
        late = time.monotonic() - self._last[1] >= self._seconds
        # One small all-reduce a step: clocks and signals differ between ranks.
        wish = self.job.ranks.largest(2 if self.job.stop.wished else int(late))
        self.stopped = wish == 2
        if self.stopped or wish or step - self._last[0] >= self._steps:
            self.save(best)
        if self.stopped:
            self.wait()
        return self.stopped

    def save(self, best: Mapping[str, Tensors] | None) -> None:
        """Copy the state, and write it in the background."""
        # Until all have the last one whole, none may delete the one before it.
        self.wait()
        self._remove_given_up()
        step = self.loop.progress.step
        writes: list[Callable[[], Any]] = []
        for name, tensors in gather_state(self.engine, self.trained, keep=self.writes).items():
            more = {f"{_BEST}{key}": value for key, value in (best or {}).get(name, {}).items()}
            writes.append(partial(self.experts.write, name, step, {**tensors, **more}, {"step": step}))
        if self.job.ranks.is_main:
            loads = {site: load.detach().to("cpu", copy=True) for site, load in self.loop.extras.loads.items()}
            progress = dataclasses.asdict(self.loop.progress)
            record = {
                "facts": self.facts,
                "progress": {**progress, "validation": list(progress["validation"])},
                "updates": self.engine.steps,
                "best": best is not None,
            }
            writes.append(partial(self.shared.write, _JOB, step, loads, record))
        self.background.submit(*writes)
        self._last = (step, time.monotonic())

    def _remove_given_up(self) -> None:
        """Before the first save: files of saves that were cut off, later than the step that all have, which they
        would push out. They are gone before any rank writes, lest one be taken for a file of a new save."""
        if self._given_up_after is None:
            return
        names = [self.trained.names[expert] for expert in self.trained.own] if self.writes else []
        files = [(self.experts, name) for name in names] + [(self.shared, _JOB)] * self.job.ranks.is_main
        self.background.submit(*(partial(each.remove_later, name, self._given_up_after) for each, name in files))
        self.wait()
        self._given_up_after = None

    def wait(self) -> None:
        """Until all ranks have written; raises on all of them what failed on any."""
        self.job.ranks.together(self.background.wait)

    def close(self) -> None:
        """End the thread; what is under way is written first."""
        self.background.close()


def forget(job: Job) -> None:
    """Delete what is kept of a training whose result is in the pool."""
    if (folder := job.checkpoints("joint").folder).exists():
        remove_folder(folder)


def is_gate(key: str) -> bool:
    """Of a gate or its moments; the site's own name may have a gate in it as well (``mlp.gate_proj``)."""
    for moment in MOMENTS:
        key = key.removesuffix(f".{moment}")
    return key.endswith(".gate") and not key.startswith(_BEST)


def _with_prefix(tensors: Mapping[str, torch.Tensor], prefix: str) -> Tensors:
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
