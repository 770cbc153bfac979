"""A cache of its own for each test of a base."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def cache(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of its own for each test, but for those that use the 135M model this machine already has."""
    folder = tmp_path / "cache"
    if request.node.get_closest_marker("model") is None or request.node.get_closest_marker("slow") is not None:
        monkeypatch.setenv("GLIDER_DIST_CACHE", str(folder))
    return folder
