"""Checking a pool against itself: hashes, shapes, finiteness, gates, links and files that do not belong."""

from __future__ import annotations

import os
from pathlib import Path

from glider_dist.errors import GliderError
from glider_dist.pool.adapter import CARD_FILE, EXPERT_FILES, GATE_FILE, check_finite
from glider_dist.pool.expert import Expert
from glider_dist.pool.files import sha256
from glider_dist.pool.fingerprint import check_gate, check_sites
from glider_dist.pool.names import check_name
from glider_dist.pool.store import ExpertPool
from glider_dist.tracking.progress import progress

_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")


def verify(pool: ExpertPool) -> list[str]:
    """Every problem found, one sentence each; reads all weights."""
    problems = stray_files(pool.path) + leftovers(pool)
    for name in progress(pool.names, desc="verifying", enabled=len(pool) > 20):
        expert = Expert(pool.path / "experts" / name)
        problems += _check_files(expert)
        try:
            _check_weights(expert, pool)
        except GliderError as error:
            problems.append(str(error))
    return problems


def leftovers(pool: ExpertPool) -> list[str]:
    """What a process that was killed has left; hidden, so nothing reads it."""
    found = sorted((pool.path / "experts").glob(".*.tmp")) + sorted((pool.path / "experts").glob(".*.old"))
    return [f"{path} was left by a process that ended early; delete it unless one writes it now" for path in found]


def stray_files(root: Path) -> list[str]:
    """Links that leave the folder, and files that could run code when they are loaded."""
    problems = []
    inside = root.resolve()
    for folder, folders, files in os.walk(root):
        for name in (*folders, *files):
            path = os.path.join(folder, name)
            if os.path.islink(path) and not Path(path).resolve().is_relative_to(inside):
                problems.append(f"{path} is a link that leaves the pool")
            elif name.endswith(_PICKLES):
                problems.append(f"{path} may be a pickle, which no pool needs; delete it")
    return sorted(problems)


def _check_files(expert: Expert) -> list[str]:
    try:
        card = expert.card()
    except GliderError as error:
        return [str(error)]
    if not card:
        return [f"{expert.folder / CARD_FILE} does not exist, so the files' hashes are unknown"]
    hashes = card.get("files", {})
    problems = []
    # The card may know of more, such as mean activations.
    for file in dict.fromkeys((*EXPERT_FILES, *hashes)):
        path = expert.folder / file
        if not path.exists():
            if file in hashes:
                problems.append(f"{path} is missing, though the card has its hash")
        elif file not in hashes:
            problems.append(f"{path} has no hash in the card")
        elif sha256(path) != hashes[file]:
            problems.append(f"{path} has changed: its sha256 is not the one in the card")
    return problems


def _check_weights(expert: Expert, pool: ExpertPool) -> None:
    check_name(expert.name)
    weights = expert.weights()
    shapes = {site: (lora.B.shape[0], lora.A.shape[1]) for site, lora in weights.items()}
    check_sites(expert.name, shapes, pool.fingerprint.sites)
    check_finite(expert.name, weights)
    if (expert.folder / GATE_FILE).exists():  # finished or not
        check_gate(expert.name, expert.gate(), shapes)
