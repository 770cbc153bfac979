"""glider_dist: large pools of LoRA experts behind one model."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from glider_dist.config import RouterConfig
    from glider_dist.errors import GliderError
    from glider_dist.model.attach import (
        assign_experts,
        attach_pool,
        detach,
        query_scores,
        reset_routing_stats,
        routing_stats,
        set_router,
    )
    from glider_dist.model.generate import generate
    from glider_dist.parallel.cost import Costs
    from glider_dist.parallel.mesh import Mesh, init_mesh
    from glider_dist.parallel.placement import Placement
    from glider_dist.pool import Expert, ExpertPool, Fingerprint

__version__ = "0.1.0"

__all__ = [
    "Costs",
    "Expert",
    "ExpertPool",
    "Fingerprint",
    "GliderError",
    "Mesh",
    "Placement",
    "RouterConfig",
    "assign_experts",
    "attach_pool",
    "detach",
    "generate",
    "init_mesh",
    "query_scores",
    "reset_routing_stats",
    "routing_stats",
    "set_router",
]

# Where each is: loaded when first asked for, so that help and mistakes in a command need no torch.
_HOMES = {
    "config": ("RouterConfig",),
    "errors": ("GliderError",),
    "model.attach": (
        "assign_experts",
        "attach_pool",
        "detach",
        "query_scores",
        "reset_routing_stats",
        "routing_stats",
        "set_router",
    ),
    "model.generate": ("generate",),
    "parallel.cost": ("Costs",),
    "parallel.mesh": ("Mesh", "init_mesh"),
    "parallel.placement": ("Placement",),
    "pool": ("Expert", "ExpertPool", "Fingerprint"),
}


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f"{__name__}.{home}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
