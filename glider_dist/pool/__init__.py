"""The pool of experts on disk."""

from glider_dist.pool.adapter import SiteLora
from glider_dist.pool.store import Expert, ExpertPool, Fingerprint

__all__ = ["Expert", "ExpertPool", "Fingerprint", "SiteLora"]
