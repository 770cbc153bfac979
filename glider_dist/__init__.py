"""glider_dist: large pools of LoRA experts behind one model."""

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
