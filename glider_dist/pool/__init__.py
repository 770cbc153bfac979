"""The pool of experts on disk."""

from glider_dist.pool.adapter import SiteLora
from glider_dist.pool.expert import Expert
from glider_dist.pool.fingerprint import Fingerprint
from glider_dist.pool.store import ExpertPool

__all__ = ["Expert", "ExpertPool", "Fingerprint", "SiteLora"]
