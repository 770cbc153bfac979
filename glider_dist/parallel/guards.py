"""Guards against corruption that no error would show: each costs little and ends in one sentence.

DeepSpeed, for example, overwrites expert parameters that it does not recognise with those of rank 0, and adds one
expert's gradient to another's where a replica lacks one.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch

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
    mesh: Mesh | None, names: tuple[str, ...], banks: dict[str, SiteBank], served: dict[str, torch.Tensor]
) -> None:
    """After the first backward pass: an expert's gradient is 0 exactly where no rank sent it tokens.

    Args:
        names: names of this rank's experts, in the order of its banks.
        banks: their parameters, with gradients summed over replicas.
        served: ``{site: [e]}`` tokens that each of them served, summed over all ranks.

    Raises:
        GliderError: naming expert and site. (B starts at 0, so that A's gradient may be 0; B's is looked at.)
    """
    where = "" if mesh is None else f" on rank {mesh.rank}"
    for site, bank in banks.items():
        if not bank.B.requires_grad:
            continue
        if bank.B.grad is None:
            raise GliderError(
                f"the experts at {site}{where} have no gradient at all; keep the stacked parameter in use"
            )
        norm_e = bank.B.grad.flatten(1).norm(dim=1).cpu()
        for name, norm, tokens in zip(names, norm_e.tolist(), served[site].tolist(), strict=True):
            if (tokens == 0) != (norm == 0):
                what = (
                    "a gradient without having served a token"
                    if tokens == 0
                    else f"no gradient from {tokens} tokens"
                )
                raise GliderError(
                    f"expert {name!r} got {what} at {site}{where}; its gradients are wrong, stop here"
                )


def _digest(value: Any) -> str:
    return hashlib.sha256(repr(value).encode()).hexdigest()
