"""The stage ``train-joint``: train a pool's experts and gates together, through the routers that will use them.

It starts from a pool and leaves new versions of what trained in it. The base is frozen; ZeRO 0 to 3 hold the
experts, gates and optimizer (``deepspeed_moe``), the base is sharded besides under ZeRO 3 (``model.engine``).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import ExitStack

from glider_dist.errors import GliderError
from glider_dist.evaluation import calibrate
from glider_dist.job import Job
from glider_dist.pool import ExpertPool
from glider_dist.pool.calibration import CALIBRATION_FILE
from glider_dist.pool.files import read_json, write_json
from glider_dist.pool.lock import hold_all, holding_pool
from glider_dist.semantics import describe, indexing
from glider_dist.training import joint_multitask
from glider_dist.training.experts import train_experts, train_gates
from glider_dist.training.joint_config import check_joint
from glider_dist.training.joint_keep import forget
from glider_dist.training.joint_pool import (
    complete,
    move_into_place,
    staging_pool,
    training_key,
    versions_digest,
    write_version,
)
from glider_dist.training.joint_train import Result, train_multitask, train_routed

log = logging.getLogger(__name__)
RECORD = "joint.json"


def run(job: Job) -> None:
    """Train the pool jointly and replace what trained; nothing if that was done already."""
    check_joint(job.cfg)
    if job.cfg.joint.multitask:
        return _multitask(job)
    if job.cfg.joint.prepare:
        for stage in (train_experts, train_gates, describe.run, indexing.run, calibrate.run):
            stage(job)
    with job.ranks.together(lambda: _hold_pool(job)):
        changed = _run(job)
    if changed:
        _calibrate(job, job.open_pool(check_base=False))


def _hold_pool(job: Job) -> ExitStack:
    stack = ExitStack()
    if job.ranks.is_main:
        stack.enter_context(holding_pool(job.open_pool(check_base=False).path))
    return stack


def _run(job: Job) -> bool:
    """Returns whether the pool's experts are those of this training, so that its calibration may be of others."""
    job.ranks.on_main(lambda: _finish_earlier(job.open_pool(check_base=False)))
    pool = job.open_pool(check_base=False)
    key, record = training_key(job), job.run_dir / RECORD
    done = record.exists() and read_json(record) == {"key": key, "pool": versions_digest(pool)}
    # No rank may change the pool before all have come here.
    if job.ranks.from_main(done):
        if job.ranks.is_main:
            log.info("this training was done already, and the pool is as it left it")
        job.ranks.on_main(lambda: forget(job))
        return True
    pool.check_base(job.fingerprint)
    changes = job.cfg.joint.experts or list(pool.names)
    locks = job.ranks.together(lambda: hold_all(pool.path, changes if job.ranks.is_main else []))
    with locks:
        result = train_routed(job, pool)

        def note() -> None:
            """Before the new versions take their places: a job killed after that is done, and knows it; one killed
            before finds the pool as it was."""
            write_json(record, {"key": key, "pool": versions_digest(pool, staging_pool(pool))})

        if result is not None:
            _store(job, pool, result, note)
        else:
            job.ranks.on_main(note)
            if job.ranks.is_main:
                log.warning("no step was better than the pool is, which stays as it was; try lower learning rates")
        job.ranks.on_main(lambda: forget(job))
    return result is not None


def _calibrate(job: Job, pool: ExpertPool) -> None:
    """Make a calibration that is there for the experts as they are now; does nothing if it is."""
    if (pool.router_dir / CALIBRATION_FILE).exists() and job.cfg.joint.recalibrate:
        calibrate.run(job)


def _finish_earlier(pool: ExpertPool) -> None:
    if move_into_place(pool):
        log.info("an earlier train-joint had written its experts; they are in place now")


def _multitask(job: Job) -> None:
    if joint_multitask.check_pool(job):
        if job.ranks.is_main:
            log.info("the pool has the expert %r already", joint_multitask.NAME)
    else:
        job.create_pool()
        with job.ranks.together(lambda: _hold_pool(job)):
            if not joint_multitask.check_pool(job):
                result = train_multitask(job)
                job.ranks.on_main(lambda: joint_multitask.store(job, result.weights, result.card))
    job.ranks.on_main(lambda: forget(job))


def _store(job: Job, pool: ExpertPool, result: Result, note: Callable[[], None]) -> None:
    """Each expert is written by the rank that has its weights; when all are there, rank 0 calls ``note`` and moves
    them into place."""

    def write() -> None:
        for name, tensors in result.weights.items():
            try:
                write_version(pool, name, tensors, result.card)
            except OSError as error:
                raise GliderError(
                    f"the new version of expert {name!r} cannot be written ({error}); the pool is as it was"
                ) from None

    job.ranks.together(write)
    names = sorted({name for part in job.ranks.gather(list(result.weights)) for name in part})

    def swap() -> None:
        note()
        complete(pool, names)
        move_into_place(pool)
        log.info("%d experts have new versions in %s", len(names), pool.path)

    job.ranks.on_main(swap)
