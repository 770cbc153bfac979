"""Dispatch: tokens meet experts that live on different ranks, by whichever way is configured or cheaper.

``Dispatch`` is blind to why a token goes where it goes: it is handed the routes of all sites that read one input,
and returns what their experts add. Every rank of the expert-parallel group calls it the same number of times, with
or without tokens.

Per exchange there is one control all-gather and one host sync, whatever the strategy. The control row of a rank:
rows for each rank, (token, expert) pairs for each site and rank (int32), then, unless the strategy is
``all_to_all``, a byte for each site and expert: 1 if its tokens need the expert, 2 if its cache lacks it besides.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from glider_dist.errors import GliderError
from glider_dist.lora.apply import sum_experts
from glider_dist.lora.bank import SiteBank
from glider_dist.parallel.cost import Costs, Shapes, tokens_time, weights_time
from glider_dist.parallel.exchange import all_gather_rows, in_backward, to_host
from glider_dist.parallel.mesh import Mesh
from glider_dist.parallel.placement import Placement
from glider_dist.parallel.tokens import Sizes, tokens_to_experts
from glider_dist.parallel.weights import ExpertCache, Pair, fetch_experts, plan_fetch
from glider_dist.routing.route import Route

DISPATCHES = ("auto", "local", "all_to_all", "gather")


@dataclass(frozen=True)
class Control:
    """The control numbers of all ranks, on the host.

    Attributes:
        rows: ``[P, P]`` tokens that each rank would send to each.
        used: ``[P, S, P]`` (token, expert) pairs of each rank, per site and owner.
        need: ``[P, S, E]`` 1 for experts that each rank's tokens use, 2 for those that it would fetch; else 0.
            None under ``all_to_all``.
    """

    rows: np.ndarray[Any, Any]
    used: np.ndarray[Any, Any]
    need: np.ndarray[Any, Any] | None


class Dispatch:
    """See the module.

    Attributes:
        strategy: ``auto``, ``all_to_all`` or ``gather``.
        chosen: how often each strategy was used.
    """

    def __init__(
        self,
        mesh: Mesh,
        placement: Placement,
        strategy: str,
        scales: dict[str, torch.Tensor],
        device: torch.device,
        costs: Costs | None = None,
        cache_bytes: int = 1 << 30,
    ):
        if strategy not in ("auto", "all_to_all", "gather"):
            raise GliderError(f"dispatch={strategy!r} is unknown; choose one of {', '.join(DISPATCHES)}")
        if placement.ranks != mesh.expert_parallel or mesh.expert_group is None:
            raise GliderError(f"the placement is for {placement.ranks} ranks, but the mesh has {mesh}")
        self.mesh = mesh
        self.placement = placement
        self.strategy = strategy
        self.scales = scales
        self.device = device
        self.costs = costs or Costs()
        self.chosen = {"all_to_all": 0, "gather": 0}
        self._before: dict[tuple[str, ...], str] = {}
        # The last entry serves the id -1 of an unused place: owned by a rank that does not exist.
        self._owner = torch.tensor([*placement.owner, placement.ranks], device=device)
        self._slot = torch.tensor([*placement.slot, 0], device=device)
        self._owned = [np.array(placement.owned(rank), dtype=np.int64) for rank in range(placement.ranks)]
        self._owner_EP = np.equal.outer(placement.owner, range(placement.ranks)).astype(np.float32)
        self.cache = ExpertCache(cache_bytes, self._owned[mesh.expert_rank], len(placement.names), device)

    def __call__(
        self, x_Td: torch.Tensor, sites: Sequence[str], routes: Sequence[Route], banks: Sequence[SiteBank]
    ) -> list[torch.Tensor]:
        """``Σ_k w_k s B_k A_k x`` for each site that reads ``x_Td``.

        Args:
            x_Td: ``[T, d]`` this rank's routed tokens; T may be 0.
            sites: the sites' names.
            routes: for each site, global expert ids and weights ``[T, K]``.
            banks: for each site, the experts that this rank owns.

        Returns:
            For each site ``[T, d_out]`` fp32 (fp64 for fp64 inputs).

        Raises:
            GliderError: another rank left.
        """
        # Even where no gradient is wanted now: experts that train are not the same next time.
        trained = any(bank.A.requires_grad or bank.B.requires_grad for bank in banks)
        backward = torch.is_grad_enabled() and (trained or x_Td.requires_grad or routes[0].weights.requires_grad)
        need_PT, control = self._agree(x_Td, sites, routes, trained)
        shapes = tuple((bank.A.shape[1], bank.A.shape[2], bank.B.shape[2]) for bank in banks)
        way = self.strategy
        if way == "auto" and in_backward():
            # The cache has changed since, and with it the costs; recomputed activations must be made alike.
            way = self._before[tuple(sites)]
        elif way == "auto":
            way = self._before[tuple(sites)] = self._cheaper(control, shapes, x_Td, routes, backward)
        self.chosen[way] += 1
        me, group = self.mesh.expert_rank, self.mesh.expert_group
        assert group is not None
        if way == "all_to_all":
            used = control.used[:, :, me].sum(0).tolist()
            sizes = Sizes(
                tuple(control.rows[me].tolist()), tuple(control.rows[:, me].tolist()), tuple(used), group
            )
            return tokens_to_experts(x_Td, routes, banks, need_PT, self._owner, self._slot, sizes)
        assert control.need is not None
        asks = control.need == 2
        plan = plan_fetch(asks, me, self._owned, shapes, x_Td.dtype, group)
        fetched = fetch_experts(banks, plan) if asks.any() else None
        outs = []
        for place, (site, route, bank) in enumerate(zip(sites, routes, banks, strict=True)):
            ids, pair = plan.ids(place), None if fetched is None else fetched[place]
            if not trained:
                ids, new = np.flatnonzero(control.need[me, place]), ids
                pair = self.cache.stack(site, ids, bank, new, pair, x_Td.dtype)
            elif pair is None:
                # No rank has a token: the experts stay in the graph.
                pair = bank.A[:0], bank.B[:0]
            outs.append(self._compute(x_Td, site, route, ids, pair, int(control.used[me, place].sum())))
        self.cache.shrink()
        return outs

    def bring(
        self, wanted_E: torch.Tensor, banks: dict[str, SiteBank]
    ) -> tuple[torch.Tensor, dict[str, SiteBank]]:
        """Fetch some frozen experts for all sites, so that whole forwards need no exchange.

        One control exchange and host sync, then one collective for every 256 MiB or so of experts. All ranks of
        the group call it at the same time; they may want other experts, or none.

        Args:
            wanted_E: ``[E]`` bool, experts that this rank's next forwards may use.

        Returns:
            ``[E]`` int64 positions in the new banks (-1: not there; one more entry for the id -1), and the banks.
        """
        group = self.mesh.expert_group
        assert group is not None
        ranks, experts, sites = self.placement.ranks, len(self.placement.names), list(banks)
        ask_SE = torch.stack([wanted_E & ~self.cache.held(site) for site in sites])
        asks = all_gather_rows("counts", ask_SE.view(torch.uint8).flatten(), group)
        both = to_host(torch.cat([asks.flatten(), wanted_E.view(torch.uint8)])).numpy()
        everyone = both[: asks.numel()].reshape(ranks, len(sites), experts)
        ids = np.flatnonzero(both[asks.numel() :])
        index = torch.from_numpy(ids).to(self.device, non_blocking=True)
        found = {}
        fetched_S = everyone[self.mesh.expert_rank].sum(1)
        nbytes = sum(
            int(count) * _expert_bytes(bank) for count, bank in zip(fetched_S, banks.values(), strict=True)
        )
        # More would push out itself: copies that are made and thrown away.
        remember = nbytes <= self.cache.limit
        for part in _parts(banks, everyone.max(1).sum(1).max(), 256 << 20):
            places = [sites.index(site) for site in part]
            pairs: list[Pair | None] = [None] * len(part)
            chosen = [banks[site] for site in part]
            dtype = chosen[0].A.dtype
            shapes = [(bank.A.shape[1], bank.A.shape[2], bank.B.shape[2]) for bank in chosen]
            plan = plan_fetch(everyone[:, places], self.mesh.expert_rank, self._owned, shapes, dtype, group)
            if everyone[:, places].any():
                pairs = list(fetch_experts(chosen, plan))
            for place, (site, bank) in enumerate(zip(part, chosen, strict=True)):
                pair = self.cache.stack(site, ids, bank, plan.ids(place), pairs[place], dtype, remember)
                scale = self.scales[site][index]
                found[site] = SiteBank(*pair, scale, torch.ones_like(index, dtype=torch.bool), (1,) * len(ids))
        if any(bank.A.requires_grad or bank.B.requires_grad for bank in banks.values()):
            self.cache.clear()
        self.cache.shrink()
        position = torch.full((experts + 1,), -1, device=self.device)
        position[index] = torch.arange(len(ids), device=self.device)
        return position, found

    def _agree(
        self, x_Td: torch.Tensor, sites: Sequence[str], routes: Sequence[Route], trained: bool
    ) -> tuple[torch.Tensor, Control]:
        """``[P, T]`` bool (has this token an expert on that rank?) and the numbers of all ranks."""
        ranks, experts, tokens = self.placement.ranks, len(self.placement.names), x_Td.shape[0]
        need_PT = torch.zeros(ranks + 1, tokens, dtype=torch.bool, device=x_Td.device)
        used = torch.zeros(len(sites), ranks + 1, dtype=torch.int64, device=x_Td.device)
        mine = torch.zeros(len(sites), experts + 1, dtype=torch.bool, device=x_Td.device)
        for place, route in enumerate(routes):
            to_TK = self._owner[route.expert_ids]
            need_PT.scatter_(0, to_TK.t(), True)
            used[place].scatter_add_(0, to_TK.flatten(), torch.ones_like(to_TK).flatten())
            if self.strategy != "all_to_all":
                ids = route.expert_ids.flatten()
                mine[place].scatter_(0, ids.masked_fill(ids < 0, experts), True)
        need_PT, mine = need_PT[:ranks], mine[:, :experts]
        numbers = torch.cat([need_PT.sum(1), used[:, :ranks].flatten()]).to(torch.int32).view(torch.uint8)
        group = self.mesh.expert_group
        assert group is not None
        if self.strategy == "all_to_all":
            host = to_host(all_gather_rows("counts", numbers, group)).numpy()
            return need_PT, Control(*self._numbers(host, len(sites)), None)
        ask = mine if trained else mine & ~torch.stack([self.cache.held(site) for site in sites])
        row = torch.cat([numbers, (mine.view(torch.uint8) + ask.view(torch.uint8)).flatten()])
        host = to_host(all_gather_rows("counts", row, group)).numpy()
        need = host[:, len(numbers) :].reshape(ranks, len(sites), experts)
        return need_PT, Control(*self._numbers(host[:, : len(numbers)], len(sites)), need)

    def _numbers(
        self, host: np.ndarray[Any, Any], sites: int
    ) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        ranks = self.placement.ranks
        numbers = np.ascontiguousarray(host).view(np.int32)
        return numbers[:, :ranks], numbers[:, ranks:].reshape(ranks, sites, ranks)

    def _cheaper(
        self,
        control: Control,
        shapes: tuple[tuple[int, int, int], ...],
        x_Td: torch.Tensor,
        routes: Sequence[Route],
        backward: bool,
    ) -> str:
        places = sum(route.expert_ids.shape[1] for route in routes)
        sizes = Shapes(shapes, places, x_Td.element_size(), routes[0].weights.element_size())
        assert control.need is not None
        # Products count the experts of each owner several times as fast as index by index.
        fetched_PSP = (control.need == 2) @ self._owner_EP
        wanted_PSE = control.need != 0
        serving_P = wanted_PSE.any(0).sum(0) @ self._owner_EP
        wanted_P = wanted_PSE.sum((1, 2))
        by_tokens = tokens_time(self.costs, sizes, control.rows, control.used, serving_P, backward)
        by_weights = weights_time(self.costs, sizes, fetched_PSP, control.used, wanted_P, backward)
        return "gather" if by_weights < by_tokens else "all_to_all"

    def _compute(
        self, x_Td: torch.Tensor, site: str, route: Route, ids: np.ndarray[Any, Any], pair: Pair, used: int
    ) -> torch.Tensor:
        """The experts ``ids``, whose A and B have come here, on this rank's own tokens."""
        index = torch.from_numpy(ids).to(self.device, non_blocking=True)
        bank = SiteBank(*pair, self.scales[site][index], torch.ones_like(index, dtype=torch.bool), (1,) * len(ids))
        # The last entry serves the id -1 of an unused place.
        position = torch.full((len(self.placement.names) + 1,), -1, device=self.device)
        position[index] = torch.arange(len(ids), device=self.device)
        here = Route(position[route.expert_ids], route.weights, ragged=True)
        return sum_experts(x_Td, bank, here, used)


def _parts(banks: dict[str, SiteBank], experts: int, limit: int) -> list[list[str]]:
    """Consecutive sites whose experts together stay within the limit in bytes (one site at least)."""
    parts: list[list[str]] = [[]]
    size = 0
    for site, bank in banks.items():
        own = int(experts) * _expert_bytes(bank)
        if parts[-1] and size + own > limit:
            parts.append([])
            size = 0
        parts[-1].append(site)
        size += own
    return parts


def _expert_bytes(bank: SiteBank) -> int:
    """Of A and B of one expert."""
    return bank.A.element_size() * bank.A.shape[1] * (bank.A.shape[2] + bank.B.shape[2])
