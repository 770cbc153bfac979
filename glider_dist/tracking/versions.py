"""With what a run was made: versions, commit, command line and machine."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

_PACKAGES = ("glider_dist", "torch", "deepspeed", "transformers", "peft", "datasets", "wandb", "omegaconf")


def versions() -> dict[str, Any]:
    """The record of this start, for ``versions.json``."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _installed(name) for name in _PACKAGES},
        "git": _git(),
        "command": sys.argv,
        "submit": os.environ.get("GLIDER_SUBMIT", ""),
        "folder": os.getcwd(),
        "launcher": _launcher(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "cpus": os.cpu_count(),
        "device": device_name(),
    }


def _launcher() -> str:
    """What started the ranks, as far as the environment tells."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return "torchrun"
    if any(word.startswith("--local_rank") for word in sys.argv):
        return "deepspeed"
    return "srun" if os.environ.get("SLURM_STEP_NUM_TASKS", "1") != "1" else ""


def _installed(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git() -> dict[str, Any] | None:
    """Commit of the source tree and whether the package differs from it; None where it is no checkout."""
    package = Path(__file__).resolve().parents[1]
    try:
        top = _git_output(package, "rev-parse", "--show-toplevel")
        if Path(top).resolve() != package.parent:
            return None
        commit = _git_output(package, "rev-parse", "HEAD")
        return {"commit": commit, "dirty": bool(_git_output(package, "status", "--porcelain", "--", "."))}
    except (OSError, subprocess.SubprocessError):
        return None


def _git_output(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()


def device_name() -> str:
    """The GPU of this process, or the kind of CPU."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu ({platform.machine()})"
