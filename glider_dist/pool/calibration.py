"""``router/calibration.json``: what it must hold, and whether it was made for the pool as it is now."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

from glider_dist.errors import GliderError
from glider_dist.pool.adapter import EXPERT_FILES
from glider_dist.pool.files import digest_of, read_json, sha256
from glider_dist.pool.store import ExpertPool

log = logging.getLogger(__name__)
CALIBRATION_FILE = "calibration.json"
# A threshold is a cosine; calibrate may put it a hundredth beyond the largest or smallest.
_RANGES = {"alpha_in": (0.0, math.inf), "alpha_out": (0.0, math.inf), "threshold": (-1.011, 1.011)}


def calibrated_files(pool: ExpertPool) -> dict[str, dict[str, str]]:
    """``{expert: {file: sha256}}`` of what makes an expert: average activations, say, change no score."""
    return {
        name: {file: digest for file, digest in files.items() if file in EXPERT_FILES}
        for name, files in pool.files().items()
    }


def made_for(pool: ExpertPool, index: Path) -> dict[str, str]:
    """What a calibration depends on: hashes of all experts' files, as their cards have them, and of the index."""
    return {"experts": digest_of(calibrated_files(pool)), "index": sha256(index)}


def stored_calibration(pool: ExpertPool) -> dict[str, Any]:
    """As it is; empty if there is none. Raises GliderError if it is no JSON object."""
    path = pool.router_dir / CALIBRATION_FILE
    return read_json(path, "run calibrate again") if path.exists() else {}


def read_calibration(pool: ExpertPool, local_scores: list[str | float]) -> dict[str, Any]:
    """The pool's calibration as stored; empty if there is none.

    Warns if other experts were calibrated, or other local scores, by which the alphas are measured.

    Args:
        local_scores: of the router that takes it (``routing.strategies.local_scores``).

    Raises:
        GliderError: it is no JSON object.
    """
    value = stored_calibration(pool)
    if not value:
        return value
    path = pool.router_dir / CALIBRATION_FILE
    noted = value.get("made_for")
    if isinstance(noted, dict) and noted.get("experts") != digest_of(calibrated_files(pool)):
        log.warning("%s was made for other experts than the pool has now; run calibrate again", path)
    made_with = value.get("local_scores")
    if made_with and local_scores and made_with != local_scores:
        log.warning(
            "%s was made for the local scores %s, this router has %s; run calibrate with it",
            path, made_with, local_scores,
        )  # fmt: skip
    return value


def check_calibration(pool: ExpertPool, index: Path) -> None:
    """Check the pool's calibration, if it has one.

    Raises:
        GliderError: a value is missing, no number or out of range, or other experts or another index were
            calibrated (told only where the calibration noted what it was made for).
    """
    path = pool.router_dir / CALIBRATION_FILE
    if not path.exists():
        return
    again = "run calibrate again"
    value = stored_calibration(pool)
    for key, (low, high) in _RANGES.items():
        if key not in value:
            raise GliderError(f"{path} has no {key}; {again}")
        _check_number(f"{path}: {key}", value[key], low, high, again)
    if value["alpha_in"] < value["alpha_out"]:
        raise GliderError(
            f"{path}: alpha_in={value['alpha_in']} is below alpha_out={value['alpha_out']}, so a query that an "
            f"expert describes would trust the descriptions less; {again}"
        )
    noted = value.get("made_for")
    if noted is None:
        return
    if not index.exists():
        raise GliderError(f"{path} was made with an index, but {index} does not exist; run index and {again}")
    now = made_for(pool, index)
    if noted != now:
        other = "experts" if not isinstance(noted, dict) or noted.get("experts") != now["experts"] else "index"
        raise GliderError(f"{path} is stale: the pool's {other} changed after it was made; {again}")


def _check_number(what: str, value: Any, low: float, high: float, again: str) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise GliderError(f"{what} is {value!r}, not a number; {again}")
    if not low <= value <= high:
        bounds = f"in [{low:g}, {high:g}]" if math.isfinite(high) else f"at least {low:g}"
        raise GliderError(f"{what} is {value}, but must be {bounds}; {again}")
