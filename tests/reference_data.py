"""Where the reference data lies: beside the repository, never in it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

SHARED = Path(os.environ.get("GLIDER_DIST_SHARED", Path(__file__).resolve().parents[2] / "shared"))


def reference(name: str) -> Path:
    """A folder of reference data kept beside the repository, or skip with a sentence that says so."""
    folder = SHARED / name
    if not folder.exists():
        pytest.skip(
            f"reference data {folder} is not there; set GLIDER_DIST_SHARED to the folder that holds {name}"
        )
    return folder
