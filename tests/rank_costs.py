"""What an exchange costs: its traffic from the ids alone, and whatever would make the host wait for a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from unittest.mock import patch

import torch
from host_waits import Waits
from rank_cases import Case, Outcome, draw_inputs, run_case

from glider_dist.lora.bank import SiteBank
from glider_dist.parallel.exchange import Traffic, to_host


def expected_traffic(case: Case, strategy: str, parts: int, rank: int, world: int) -> tuple[Traffic, Traffic]:
    """Forward and backward of a first exchange (nothing is cached), from the ids alone."""
    placement = case.place(parts)
    everyone = draw_inputs(case, world, placement)
    start = rank // parts * parts
    group, me = everyone[start : start + parts], rank - start
    owner, sites, b = placement.owner, range(len(case.shapes)), case.dtype.itemsize
    w = case.wide.itemsize
    places = sum(route.expert_ids.shape[1] for route in group[0].routes)
    d, total_o = case.shapes[0][1], sum(o for _, _, o in case.shapes)

    def eight(nbytes: int) -> int:
        return (nbytes + 7) // 8 * 8

    forward, returned = Traffic(), Traffic()
    numbers = 4 * (parts + len(case.shapes) * parts)
    asks = 0 if strategy == "all_to_all" else len(case.shapes) * case.experts
    forward.add("counts", (numbers + asks) * (parts - 1))
    forward.host_syncs = 1
    if strategy == "all_to_all":
        rows = [[0] * parts for _ in range(parts)]
        for source, each in enumerate(group):
            for token in range(each.x.shape[0]):
                wanted = {owner[e] for route in each.routes for e in route.expert_ids[token].tolist() if e >= 0}
                for target in wanted:
                    rows[source][target] += 1
        leave = sum(rows[me]) - rows[me][me]
        arrive = sum(row[me] for row in rows) - rows[me][me]
        forward.add("tokens", leave * eight(eight(d * b) + places * (w + 4)))
        forward.add("outputs", arrive * total_o * b)
        returned.add("outputs_grad", leave * total_o * b)
        returned.add("tokens_grad", arrive * eight(eight(d * b) + places * w))
        return forward, returned
    used = [
        {(site, e) for site in sites for e in each.routes[site].expert_ids.flatten().tolist() if e >= 0}
        for each in group
    ]

    def nbytes(pairs: set[tuple[int, int]]) -> int:
        return sum(case.shapes[site][0] * (case.shapes[site][1] + case.shapes[site][2]) * b for site, _ in pairs)

    trained = not case.frozen
    if any(used[p] if trained else {(s, e) for s, e in used[p] if owner[e] != p} for p in range(parts)):
        leave = sum(nbytes({(s, e) for s, e in used[p] if owner[e] == me}) for p in range(parts) if p != me)
        forward.add("experts", leave)
        if trained:
            returned.add("experts_grad", nbytes({(s, e) for s, e in used[me] if owner[e] != me}))
    return forward, returned


def run_like_gpu(
    case: Case, strategy: str, expert_parallel: int, small: bool
) -> tuple[dict[str, int], list[Outcome]]:
    """One exchange without what is done on a CPU alone, and what would wait for a GPU in it."""
    waits = Waits()

    def way(tokens: int, places: int, x: torch.Tensor, bank: SiteBank) -> str:
        return "every" if small and bank.num_experts > 0 else "sorted"

    def allowed(tensor: torch.Tensor) -> torch.Tensor:
        waits.allowed = True
        try:
            return to_host(tensor)
        finally:
            waits.allowed = False

    with (
        patch("glider_dist.lora.apply.fitted", lambda plan, bank, x: (plan, bank)),
        patch("glider_dist.lora.ways.cheapest_way", way),
        patch("glider_dist.parallel.dispatch.to_host", allowed),
    ):
        found = run_case(case, strategy, expert_parallel, watch=waits)
    return waits.seen, found


def run_twice(cases: Sequence[tuple[Case, str]], expert_parallel: int) -> list[bool]:
    """Whether each case gives the same bits again, in deterministic mode."""
    torch.use_deterministic_algorithms(True)
    try:
        same = []
        for case, strategy in cases:
            first, again = ([], [])
            for kept in (first, again):
                run_case(case, strategy, expert_parallel, keep=kept)
            assert len(first) == len(again) > 0
            same.append(all(torch.equal(a, b) for a, b in zip(first, again, strict=True)))
        return same
    finally:
        torch.use_deterministic_algorithms(False)
