"""From trained tensors to new versions of a pool's experts: the old ones stay until all new ones are complete.

    pool/.joint/experts/NAME/     new versions, written by the ranks that own them
    pool/.joint/complete.json     all are there: from here on they only need to be moved into place

A killed job leaves the old pool, or one that the next start of the stage finishes.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from glider_dist.errors import GliderError
from glider_dist.evaluation.queries import queries_digest
from glider_dist.job import Job
from glider_dist.pool import Expert, ExpertPool
from glider_dist.pool.adapter import GATE_FILE, WEIGHTS_FILE, inspect_adapter
from glider_dist.pool.adapter_config import CONFIG_FILE
from glider_dist.pool.files import clear_up, digest_of, read_json, sync_folder, write_json, write_tensors
from glider_dist.training.joint_config import of_the_weights, recipes_of

STAGING = ".joint"
_COMPLETE = "complete.json"


def staging_pool(pool: ExpertPool) -> ExpertPool:
    return ExpertPool(pool.path / STAGING, pool.base, pool.fingerprint)


def write_version(pool: ExpertPool, name: str, tensors: dict[str, torch.Tensor], record: dict[str, Any]) -> None:
    """Write a new version of an expert beside the pool's own.

    Args:
        tensors: ``SITE.A``, ``SITE.B``, ``SITE.gate`` as in ``joint_state``; what is not there stays as it is.
        record: added to the card's list ``joint``, with the hashes of the version that it was made from.
    """
    old = pool.expert(name)

    def fill(folder: Path) -> None:
        shutil.copyfile(old.folder / CONFIG_FILE, folder / CONFIG_FILE)
        _write_weights(old, folder / WEIGHTS_FILE, tensors)
        gate = old.gate() if old.has_gate else {}
        gate |= {key.removesuffix(".gate"): value for key, value in tensors.items() if key.endswith(".gate")}
        if gate:
            write_tensors(folder / GATE_FILE, gate)

    card = {key: value for key, value in old.card().items() if key not in ("name", "files", "summary", "scores")}
    before = {"files": old.card().get("files", {}), "scores": old.card().get("scores", {})}
    card["joint"] = [*card.get("joint", []), {**record, "from": before}]
    staging_pool(pool).write(name, fill, card)


def _write_weights(old: Expert, path: Path, tensors: dict[str, torch.Tensor]) -> None:
    if not any(key.endswith(".A") for key in tensors):
        shutil.copyfile(old.folder / WEIGHTS_FILE, path)
        return
    weights = {}
    for site, (a_key, b_key) in inspect_adapter(old.folder).keys.items():
        weights[a_key] = tensors[f"{site}.A"]
        weights[b_key] = tensors[f"{site}.B"].t()
    write_tensors(path, weights)


def complete(pool: ExpertPool, names: list[str]) -> None:
    """All new versions are there.

    Raises:
        GliderError: one is missing.
    """
    missing = [name for name in names if name not in staging_pool(pool)]
    if missing:
        raise GliderError(f"the new version of expert {missing[0]!r} was not written; run train-joint again")
    write_json(pool.path / STAGING / _COMPLETE, {"experts": names})


def move_into_place(pool: ExpertPool) -> bool:
    """Put complete new versions in the place of the old ones, and remove incomplete ones; idempotent.

    Returns:
        Whether there were any complete ones.
    """
    staging, experts = pool.path / STAGING, pool.path / "experts"
    there = (staging / _COMPLETE).exists()
    for name in read_json(staging / _COMPLETE)["experts"] if there else []:
        new, current = staging / "experts" / name, experts / name
        if new.exists():
            if current.exists():
                os.rename(current, experts / f".{name}.{os.getpid()}.old")
            os.rename(new, current)
            sync_folder(experts)
        clear_up(experts, [name])
    shutil.rmtree(staging, ignore_errors=True)
    pool.__dict__.pop("names", None)
    return there


def versions_digest(pool: ExpertPool, newer: ExpertPool | None = None) -> str:
    """Of the experts' files; of those in ``newer`` the files there."""
    versions = {expert.name: expert for source in (pool, newer) if source for expert in source.experts()}
    files = {name: versions[name].card().get("files", {}) for name in pool.names}
    return digest_of(files)


def training_key(job: Job) -> str:
    """Everything the trained weights depend on, apart from the pool."""
    cfg = job.cfg
    state = {
        "data": [queries_digest(job.tasks.held_in, part, 1 << 60) for part in ("train", "validation")],
        "joint": of_the_weights(cfg.joint),
        "recipes": {kind: asdict(recipe) for kind, recipe in recipes_of(cfg).items()},
        "eval_examples": cfg.train.eval_examples,
        "router": asdict(cfg.router),
        "seed": cfg.seed,
        "max_length": cfg.tasks.max_length,
    }
    return digest_of(state)
