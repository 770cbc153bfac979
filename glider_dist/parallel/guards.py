"""Guards against corruption that no error would show: each costs little and ends in one sentence.

DeepSpeed, for example, overwrites expert parameters that it does not recognise with those of rank 0, and adds one
expert's gradient to another's where a replica lacks one.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch

from glider_dist.errors import GliderError
from glider_dist.lora.bank import SiteBank
from glider_dist.parallel.exchange import gather_objects
from glider_dist.parallel.mesh import Mesh
from glider_dist.parallel.placement import Placement
from glider_dist.pool import ExpertPool
from glider_dist.pool.files import digest_of

log = logging.getLogger(__name__)


def check_same_pool(mesh: Mesh, pool: ExpertPool, placement: Placement) -> None:
    """Raises GliderError, naming the rank, if ranks see another pool (names, files) or placement than rank 0."""
    facts = {
        "pool": digest_of(pool.files()),
        "placement of experts": digest_of([placement.owner, placement.ranks]),
        "mesh": digest_of([mesh.expert_parallel, mesh.data_parallel]),
    }
    everyone = gather_objects("pool and placement", facts)
    for what in facts:
        odd = [str(rank) for rank, other in enumerate(everyone) if other[what] != everyone[0][what]]
        if odd:
            raise GliderError(
                f"rank {', '.join(odd)} has another {what} than rank 0 (pool {pool.path}); "
                "start all ranks on the same one"
            )


def check_replicas(mesh: Mesh, placement: Placement, banks: dict[str, SiteBank]) -> None:
    """Raises GliderError, naming expert, site and ranks, unless all replicas hold the same bits."""
    if mesh.replica_group is None:
        return
    sums = checksums(banks)
    digests = gather_objects("checksum of all experts", digest_of(sums), mesh.replica_group)
    if digests.count(digests[0]) == len(digests):
        return
    everyone = gather_objects("checksums of experts", sums, mesh.replica_group)
    names = [placement.names[expert] for expert in placement.owned(mesh.expert_rank)]
    for rank, other in zip(mesh.replica_ranks, everyone, strict=True):
        for site in {**everyone[0], **other}:
            unknown = [None] * len(names)
            for name, first, here in zip(
                names, everyone[0].get(site, unknown), other.get(site, unknown), strict=True
            ):
                if first != here:
                    raise GliderError(
                        f"expert {name!r} differs at {site} between rank {mesh.replica_ranks[0]} and rank {rank}, "
                        "which should hold the same copy; load the pool again on all ranks"
                    )


def checksums(banks: dict[str, SiteBank]) -> dict[str, list[int]]:
    """A sum of bits per site and expert, that a single changed value changes."""
    found = {}
    for site, bank in banks.items():
        total = torch.zeros(bank.num_experts, dtype=torch.int64, device=bank.A.device)
        for tensor in (bank.A, bank.B):
            words = tensor.detach().contiguous().flatten(1).view(_WORD[tensor.element_size()])
            place = torch.arange(1, words.shape[1] + 1, device=words.device)
            # Weighted by position, so that swapped values are seen; int64 wraps around.
            total = total * 31 + (words.to(torch.int64) * place).sum(1)
        found[site] = total.tolist()
    return found


_WORD = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def check_gradients(
    names: Sequence[str], sites: Sequence[str], norms_Se: torch.Tensor, tokens_Se: torch.Tensor
) -> None:
    """After a backward pass: an expert has a gradient only where it has served tokens.

    The reverse is told but not refused: tokens that no target depends on (most of a prompt's, in the last layer)
    bring none, nor do those whose weight is 0 in this precision.

    Args:
        names: this rank's experts.
        norms_Se: ``[S, e]`` norms of their gradients at each site, as the optimizer will use them. Those of B:
            where B is 0, as in a fresh expert, A has none.
        tokens_Se: ``[S, e]`` tokens that each of them served, summed over all ranks.

    Raises:
        GliderError: naming expert and site.
    """
    # Where a gradient is NaN, products hand it to all experts: that is told for what it is, by the step's norm.
    strays = ((norms_Se > 0) & (tokens_Se == 0)).nonzero().tolist()
    if strays:
        site, expert = strays[0]
        raise GliderError(
            f"expert {names[expert]!r} got a gradient without having served a token at {sites[site]}: another "
            "expert's. This version of DeepSpeed does not sum gradients as 0.19.8 does; install that one"
        )
    for expert in ((norms_Se == 0).all(0) & (tokens_Se > 0).any(0)).nonzero().flatten().tolist():
        tokens = int(tokens_Se[:, expert].sum())
        log.warning("expert %r served %d tokens of the first step and got no gradient", names[expert], tokens)
