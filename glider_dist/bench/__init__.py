"""Measurements behind ``glider-dist bench``."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from glider_dist.errors import GliderError

if TYPE_CHECKING:
    from glider_dist.job import Job

_MODULES = {"evaluate": "evaluation", "arrow": "arrow", "without-gates": "without_gates"}


def run(job: Job, what: str = "evaluate") -> None:
    """Run one measurement.

    Raises:
        GliderError: there is no measurement of that name, or whatever it refuses.
    """
    if what not in _MODULES:
        raise GliderError(f"bench knows {', '.join(_MODULES)}, not {what!r}")
    importlib.import_module(f"glider_dist.bench.{_MODULES[what]}").run(job)
