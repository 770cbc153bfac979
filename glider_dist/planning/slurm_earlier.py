"""What an earlier submission left in a run directory: training that other shards would not go on with."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from glider_dist.errors import GliderError
from glider_dist.planning.slurm_chain import ARRAYS, Link


def check_shards(chain: Sequence[Link], shards: int, run_dir: Path) -> None:
    """Raises GliderError if a stage has checkpoints of another number of shards than ``shards``: each member finds
    its own alone, and other tasks would be its own."""
    for link in chain:
        script, folder = run_dir / "slurm" / f"{link.stage}.sbatch", run_dir / link.stage
        if link.stage not in ARRAYS or not script.is_file():
            continue
        # The script is of the last submission; without an array it has no such line.
        found = re.search(r"^GLIDER_SHARDS=(\d+)$", script.read_text(), re.M)
        earlier = int(found[1]) if found else 1
        kept = "checkpoints" if earlier == 1 else "shard-*/checkpoints"
        if earlier != shards and any(folder.glob(f"{kept}/**/step-*.safetensors")):
            raise GliderError(
                f"{folder} has unfinished training of shards={earlier}, which shards={shards} would begin anew; "
                f"use shards={earlier}, or delete {folder}/{kept} to begin anew"
            )
