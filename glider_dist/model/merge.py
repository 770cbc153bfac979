"""A base with experts merged into its weights, and the shapes of a base that is not loaded."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from glider_dist.config import OFFLINE_DEFAULT
from glider_dist.errors import GliderError, first_line
from glider_dist.model.base import load_base, on_meta
from glider_dist.model.download import smollm2_folder
from glider_dist.model.quantised import make_plain
from glider_dist.model.sites import every_linear, fingerprint
from glider_dist.pool import ExpertPool, Fingerprint
from glider_dist.pool.export import chosen, merged_weights
from glider_dist.pool.files import replacing_folder
from glider_dist.pool.fingerprint import check_sites

log = logging.getLogger(__name__)


def export_model(
    pool: ExpertPool, out: Path, names: Sequence[str] = (), dtype: str = "auto", source: str | None = None
) -> Path:
    """Write the pool's base with the mean of the experts added to its weights, as ``save_pretrained`` does.

    Args:
        out: the folder; one that is there already is replaced only if it is empty.
        dtype: of the written weights, as in :func:`load_base`; the sum is made in fp32.
        source: the base, where it is not any more where the pool says.

    Raises:
        GliderError: the base cannot be loaded, is not the pool's or is quantised beyond recall, or ``out`` holds
            something.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise GliderError(f"{out} is there already; name a new folder")
    experts = chosen(pool, names)
    try:
        base = load_base(source or pool.base, dtype, "cpu")
    except GliderError as error:
        raise GliderError(str(error) if source else f"{error} ({pool.base_origin})") from error
    pool.check_base(fingerprint(base.model))
    make_plain(base.model, base.dtype)
    sites = every_linear(base.model)
    merged = merged_weights(experts)
    check_sites("merged", {site: (b.shape[0], a.shape[1]) for site, (a, b) in merged.items()}, _shapes(sites))
    with torch.no_grad():
        for site, (a_Rd, b_oR) in merged.items():
            module: Any = sites[site].module
            delta_od = b_oR @ a_Rd
            delta = delta_od if isinstance(module, torch.nn.Linear) else delta_od.t()
            module.weight.copy_(module.weight.float() + delta)
    with replacing_folder(out) as folder:
        base.model.save_pretrained(folder)
        base.tokenizer.save_pretrained(folder)
    return out


def _shapes(sites: dict[str, Any]) -> dict[str, tuple[int, int]]:
    return {name: site.shape for name, site in sites.items()}


def base_shapes(base: str) -> Fingerprint:
    """The fingerprint of a base from its config, without its weights; an empty one if that is not at hand."""
    try:
        folder = smollm2_folder() if base == OFFLINE_DEFAULT else Path(base).expanduser()
        return fingerprint(on_meta(folder))
    except (GliderError, OSError, ValueError, KeyError, AttributeError, ImportError) as error:
        why = first_line(error)[:200]
        log.warning("the base %s is not at hand (%s); shapes are compared when it is loaded", base, why)
        return Fingerprint()
