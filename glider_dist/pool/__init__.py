"""The pool of experts on disk."""

from glider_dist.pool.adapter import SiteLora
from glider_dist.pool.fingerprint import Fingerprint
from glider_dist.pool.store import Expert, ExpertPool

__all__ = ["Expert", "ExpertPool", "Fingerprint", "SiteLora"]
