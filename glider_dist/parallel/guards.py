"""Guards against corruption that no error would show: each costs little and ends in one sentence.

DeepSpeed, for example, overwrites expert parameters that it does not recognise with those of rank 0, and adds one
expert's gradient to another's where a replica lacks one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from glider_dist.errors import GliderError
from glider_dist.lora.bank import SiteBank
from glider_dist.parallel.exchange import gather_objects
from glider_dist.parallel.mesh import Mesh
from glider_dist.parallel.placement import Placement
from glider_dist.pool import ExpertPool


def check_same_pool(mesh: Mesh, pool: ExpertPool, placement: Placement) -> None:
    """Raises GliderError, naming the rank, if ranks see another pool (names, files) or placement than rank 0."""
    files = [(name, sorted(pool.expert(name).card().get("files", {}).items())) for name in pool.names]
    facts = {"pool": _digest(files), "placement of experts": _digest([placement.owner, placement.ranks])}
    facts["mesh"] = _digest([mesh.expert_parallel, mesh.data_parallel])
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
    digests = gather_objects("checksum of all experts", _digest(sums), mesh.replica_group)
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
    names: Sequence[str],
    gradients: Mapping[str, torch.Tensor],
    served: Mapping[str, torch.Tensor],
    unread: int = 0,
) -> None:
    """After a backward pass: an expert has a gradient where it served tokens, and nowhere else.

    B's gradient is looked at, as B starts at 0, and A's gradient then is 0.

    Args:
        names: names of this rank's experts, in the order of the rows below.
        gradients: ``{site: [e, r, d_out]}`` gradients of their B, summed over replicas.
        served: ``{site: [e]}`` int64 tokens that each of them served, summed over all ranks.
        unread: tokens of a site, at most, whose output no loss reads: after the last attention those that are no
            target's, before it each text's last one. An expert that served no more may be without a gradient.

    Raises:
        GliderError: on this rank, naming expert and site.
    """
    where = f" on rank {dist.get_rank()}" if dist.is_initialized() else ""
    for site, gradient in gradients.items():
        norms = gradient.flatten(1).norm(dim=1).tolist()
        for name, norm, tokens in zip(names, norms, served[site].tolist(), strict=True):
            if tokens == 0 and norm != 0:
                what = "a gradient without having served a token"
            elif tokens > unread and norm == 0:
                what = f"no gradient from {tokens} tokens"
            else:
                continue
            raise GliderError(f"expert {name!r} got {what} at {site}{where}; its gradients are wrong, stop here")


def _digest(value: Any) -> str:
    return hashlib.sha256(repr(value).encode()).hexdigest()
