"""``glider-dist runs``: which runs there are, how they are doing, and how to go on with one."""

from __future__ import annotations

import json
import math
import shlex
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glider_dist.errors import GliderError
from glider_dist.text_table import table
from glider_dist.tracking.run import METRICS
from glider_dist.tracking.state import STATE, gone

USAGE = """usage: glider-dist runs [FOLDER]        runs below FOLDER (default: runs) with state, progress and score
       glider-dist runs show RUN_DIR    one run, and the command that goes on with it

states: running; done; stopped (by a signal or max_minutes: start it again); failed (a mistake, which it told);
killed (it ended without a word: start it again, it goes on from its last checkpoint)
"""
_TAIL = 1 << 20
_LOSSES = ("/validation_loss/p50", "/validation_loss", "/loss")


@dataclass(frozen=True)
class FoundRun:
    """A run directory as it is now. ``metrics`` holds the latest value under each name."""

    path: Path
    stage: str
    state: str
    reason: str
    updated: float
    progress: str
    metrics: dict[str, Any]
    versions: dict[str, Any]

    @property
    def score(self) -> str:
        """The best router's held-out score (the oracle's, which is no router to use, only if there is no other),
        else the latest loss, validated if there is one."""
        numbers = {name: value for name, value in self.metrics.items() if isinstance(value, float)}
        for split in ("held_out", "held_in"):
            scores = {name: value for name, value in numbers.items() if name.endswith(f"/{split}")}
            scores = {name: score for name, score in scores.items() if "/oracle/" not in name} or scores
            if scores:
                best = max(scores, key=lambda name: scores[name])
                return f"{best.removeprefix('evaluate/')} {scores[best]:.3f}"
        for end in _LOSSES:
            if names := [name for name in numbers if name.endswith(end)]:
                return f"{names[-1]} {numbers[names[-1]]:.3f}"
        return "-"

    @property
    def batch(self) -> bool:
        """Whether a batch job ran it: slurm/rank.py then started the stage, which no user does."""
        return Path(str(next(iter(self.versions.get("command", ())), ""))).name == "rank.py"

    @property
    def command(self) -> str:
        """What was typed, as a line for a shell; "" if it is not known. Of a batch job it is the line that submits
        it; of one submitted by hand, without the options of sbatch that only its user knows."""
        words = [str(word) for word in self.versions.get("command", ())][2 if self.batch else 1 :]
        words = [word for word in words if not word.startswith(("--local_rank", "--local-rank"))]
        if not words:
            return ""
        compute = self.versions.get("compute", {})
        ranks = int(compute.get("ranks", 1))
        on_node = int(compute.get("ranks_per_node", ranks))
        typed = shlex.join(words)
        if self.batch:
            script = Path(self.versions["command"][0]).with_name("stage.sbatch")
            line = self.versions.get("submit") or f"sbatch --ntasks={ranks} {shlex.quote(str(script))} {typed}"
        elif words[0] == "quickstart":
            line = f"glider-dist {typed} --ranks {ranks}"
        elif ranks == 1:
            line = f"glider-dist {typed}"
        else:
            line = f"{_launch(str(self.versions.get('launcher')), ranks, on_node)} {typed}"
        folder = self.versions.get("folder")
        return f"cd {shlex.quote(str(folder))} && {line}" if folder else line


def _launch(launcher: str, ranks: int, on_node: int) -> str:
    """What starts so many ranks, so many of them on a node; HOSTS and HOST:PORT are the user's to name."""
    several = on_node < ranks
    if launcher == "srun":
        return f"srun --ntasks={ranks}{f' --ntasks-per-node={on_node}' * several} python -m glider_dist"
    if launcher == "torchrun":
        meeting = f" --nnodes {-(-ranks // on_node)} --rdzv_backend c10d --rdzv_endpoint HOST:PORT" * several
        return f"torchrun{meeting} --nproc_per_node {on_node} -m glider_dist"
    return f"deepspeed{' --hostfile HOSTS' * several} --num_gpus {on_node} --module glider_dist"


def run(arguments: Any) -> int:
    """The command; ``arguments`` are :class:`glider_dist.cli.Arguments`."""
    words = list(arguments.words)
    if arguments.overrides or arguments.file:
        raise GliderError("runs takes a folder, or show and a run directory; see glider-dist runs --help")
    if words[:1] == ["show"]:
        if len(words) != 2:
            raise GliderError("runs show needs one run directory: glider-dist runs show runs/train-experts")
        print(show(read_run(Path(words[1]))))
        return 0
    if len(words) > 1:
        raise GliderError(f"runs takes one folder, not {len(words)}")
    root = Path(words[0] if words else "runs")
    if not root.is_dir():
        raise GliderError(f"there is no folder {root}; name the one that holds the run directories")
    found = [read_run(path) for path in find_runs(root)]
    print(run_table(found, time.time()) if found else f"no run directory in {root}")
    return 0


def find_runs(root: Path, depth: int = 3) -> list[Path]:
    """Run directories in ``root``, itself included, not looking into them."""
    if (root / "config.yaml").exists() and (root / "versions.json").exists():
        return [root]
    if depth == 0:
        return []
    inner = sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    return [found for path in inner for found in find_runs(path, depth - 1)]


def read_run(path: Path) -> FoundRun:
    """Raises GliderError if it is no run directory."""
    if not (path / "versions.json").exists():
        raise GliderError(f"{path} is no run directory (it has no versions.json); see glider-dist runs")
    state, versions = _object(path / STATE), _object(path / "versions.json")
    name, reason = str(state.get("state", "unknown")), str(state.get("reason") or "")
    updated = float(state.get("updated") or (path / "versions.json").stat().st_mtime)
    if name == "running" and (why := gone(path, updated)):
        name, reason = "killed", why
    progress = state.get("progress") or {}
    share = ""
    if progress.get("total"):
        share = f"{progress['what']} {progress['done']}/{progress['total']}"
    stage = str(state.get("stage") or path.name)
    return FoundRun(path, stage, name, reason, updated, share, _latest(path / METRICS), versions)


def _object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _latest(path: Path) -> dict[str, Any]:
    """The last value of each metric, from the end of the file."""
    if not path.exists():
        return {}
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - _TAIL))
        lines = file.read().decode("utf-8", errors="replace").splitlines()
    found: dict[str, Any] = {}
    for line in lines:
        try:
            found |= json.loads(line)
        except (ValueError, TypeError):
            continue  # cut off at either end
    return {key: float(value) if isinstance(value, (int, float)) else value for key, value in found.items()}


def run_table(runs: list[FoundRun], now: float) -> str:
    """A line for each run, the latest first."""
    rows = [
        (str(one.path), one.stage, one.state, one.progress or "-", one.score, _ago(now - one.updated))
        for one in sorted(runs, key=lambda one: -one.updated)
    ]
    return table(("run", "stage", "state", "progress", "score", "updated"), rows, cut=False)


def show(one: FoundRun) -> str:
    """What is known of a run, and the command that goes on with it."""
    lines = [
        f"run:      {one.path}",
        f"stage:    {one.stage}",
        f"state:    {one.state}{f' ({one.reason})' if one.reason else ''}",
        f"progress: {one.progress or '-'}",
        f"score:    {one.score}",
    ]
    for folder in sorted((one.path / "checkpoints").glob("*")):
        if kept := {path.parent for path in folder.rglob("step-*.safetensors")}:
            lines.append(f"kept:     checkpoints of {len(kept)} in {folder}")
    if one.command:
        how = "to go on, unless its job is queued again" if one.batch else "to go on"
        lines.append(f"{'it was started by' if one.state == 'done' else how}:\n  {one.command}")
    return "\n".join(lines)


def _ago(seconds: float) -> str:
    for unit, name in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= unit:
            return f"{math.floor(seconds / unit)} {name} ago"
    return f"{max(0, math.floor(seconds))} s ago"
