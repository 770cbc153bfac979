"""What earlier submissions left in a run directory: training that other shards would not go on with."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from omegaconf import OmegaConf

from glider_dist.errors import GliderError
from glider_dist.planning.slurm_chain import ARRAYS, Link


def check_shards(chain: Sequence[Link], shards: int, run_dir: Path) -> None:
    """Raises GliderError if a stage has checkpoints of another number of shards than ``shards``: each member finds
    its own alone, and other tasks would be its own."""
    for link in chain:
        if link.stage not in ARRAYS:
            continue
        folder = run_dir / link.stage
        kept: dict[int, list[str]] = {}
        for member in (folder, *sorted(folder.glob("shard-*"))):
            if any((member / "checkpoints").glob("**/step-*.safetensors")):
                number = 1 if member == folder else _number(member, run_dir / "slurm" / f"{link.stage}.sbatch")
                kept.setdefault(number, []).append(str(member / "checkpoints"))
        if set(kept) <= {shards}:
            continue
        found = " and ".join(f"shards={number or '?'} ({', '.join(paths)})" for number, paths in kept.items())
        if len(kept) > 1 or 0 in kept:
            raise GliderError(
                f"{folder} has unfinished training of {found}, which shards={shards} does not all go on with; "
                "delete the checkpoints that are to begin anew"
            )
        (earlier,) = kept
        raise GliderError(
            f"{folder} has unfinished training of {found}, which shards={shards} would begin anew; "
            f"use shards={earlier}, or delete these checkpoints to begin anew"
        )


def _number(member: Path, script: Path) -> int:
    """Of how many shards a member's checkpoints are, by its own record or else by the last submission's script; 0
    if neither tells."""
    if (member / "config.yaml").is_file():
        shard = OmegaConf.select(OmegaConf.load(member / "config.yaml"), "tasks.shard")
        found = re.search(r"/(\d+)$", str(shard))
    else:
        found = re.search(r"^GLIDER_SHARDS=(\d+)$", script.read_text(), re.M) if script.is_file() else None
    return int(found[1]) if found else 0
