"""Products per group: sorted rows padded to recurring or equal sizes give the sums of the rows as they came."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from glider_dist.lora import grouped
from glider_dist.lora.bank import SiteBank
from glider_dist.lora.grouped import grouped_product
from glider_dist.lora.plan import Plan, fitted, pad_groups, plan_rows
from glider_dist.lora.ways import cheapest_way
from glider_dist.routing.route import Route

EXPERTS, RANK, WIDTH, OUT = 5, 8, 16, 24


def setup(counts: list[int], dtype: torch.dtype) -> tuple[torch.Tensor, SiteBank, Plan]:
    """One row per token, so many of each expert in shuffled order."""
    torch.manual_seed(0)
    ids = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    ids = ids[torch.randperm(len(ids))]
    route = Route(ids[:, None], torch.rand(len(ids), 1, dtype=torch.float64))
    bank = SiteBank(
        torch.randn(len(counts), RANK, WIDTH, dtype=dtype, requires_grad=True),
        torch.randn(len(counts), RANK, OUT, dtype=dtype, requires_grad=True),
        torch.ones(len(counts)),
        torch.ones(len(counts), dtype=torch.bool),
    )
    x = torch.randn(len(ids), WIDTH, dtype=dtype, requires_grad=True)
    return x, bank, plan_rows(route, len(counts))


def result(x: torch.Tensor, bank: SiteBank, plan: Plan) -> list[torch.Tensor]:
    """The sum per token, and the gradients of x, A and B."""
    h = grouped_product(x[plan.token], bank.A.transpose(1, 2), plan.ends, plan.equal)
    rows = grouped_product(h * plan.weight[:, None].to(h.dtype), bank.B, plan.ends, plan.equal)
    out = torch.zeros(x.shape[0], OUT, dtype=x.dtype).index_add(0, plan.token, rows)
    return [out, *torch.autograd.grad(out.square().sum(), [x, bank.A, bank.B])]


@pytest.mark.parametrize(
    ("tokens", "width", "experts", "trains", "every"),
    [
        (64, 576, 166, False, True),
        (1, 4096, 1024, False, True),
        (16384, 4096, 64, False, True),
        (16384, 4096, 1024, False, False),
        (4096, 576, 64, True, True),
        (4096, 576, 1024, True, False),
    ],
)
def test_a_gpu_sorts_rows_only_where_all_experts_would_cost_more(tokens, width, experts, trains, every) -> None:
    def meta(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.bfloat16, device="meta")

    ranks = (16,) * experts
    bank = SiteBank(meta(experts, 16, width), meta(experts, 16, width), meta(experts), meta(experts), ranks)
    with torch.set_grad_enabled(trains):
        assert cheapest_way(tokens, 2, meta(tokens, width), bank) == ("every" if every else "sorted")


@pytest.mark.parametrize(
    ("tokens", "experts", "trains", "way"),
    [
        (8, 8, False, "every"),
        (8, 8, True, "every"),
        (8, 166, False, "each"),
        (64, 1024, False, "each"),
        (8, 166, True, "sorted"),
        (2048, 32, False, "sorted"),
        (0, 8, False, "sorted"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cpu_sorts_rows_only_where_experts_have_many_or_train(tokens, experts, trains, way, dtype) -> None:
    bank = SiteBank(
        torch.empty(experts, 16, 576, dtype=dtype), torch.empty(experts, 16, 576, dtype=dtype),
        torch.ones(experts), torch.ones(experts, dtype=torch.bool),
    )  # fmt: skip
    with torch.set_grad_enabled(trains):
        assert cheapest_way(tokens, 2, torch.empty(tokens, 576, dtype=dtype), bank) == way


@pytest.mark.parametrize("counts", [[3, 0, 9, 1, 4], [0, 0, 0, 0, 1], [6, 6, 6, 6, 6], [40, 1, 0, 0, 2]])
@pytest.mark.parametrize("multiple", [1, 4, 16])
@pytest.mark.parametrize("equal", [False, True])
def test_padded_groups_give_the_sums_and_gradients_of_the_plain_ones(
    counts: list[int], multiple: int, equal: bool
) -> None:
    x, bank, plan = setup(counts, torch.float64)
    padded = pad_groups(plan, multiple, equal)
    sizes = padded.ends.diff(prepend=torch.zeros(1, dtype=torch.int32))
    assert all(size % multiple == 0 for size in sizes.tolist())
    assert not equal or len(set(sizes.tolist())) == 1
    for ours, plain in zip(result(x, bank, padded), result(x, bank, plan), strict=True):
        assert torch.allclose(ours, plain, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("most", "batched"), [(64, True), (65, False)])
def test_a_cpu_takes_one_product_in_half_precision_unless_a_group_is_large(most: int, batched: bool) -> None:
    x, bank, plan = setup([most, 0, 2, 5, 1], torch.bfloat16)
    assert fitted(plan, bank, x)[0].equal == batched
    assert not fitted(plan, bank, x.float())[0].equal


@pytest.mark.parametrize("counts", [[3, 0, 9, 1, 4], [0, 0, 0, 0, 1], [0, 4, 0, 0, 0], [2, 2, 0, 0, 1, 0, 3]])
@pytest.mark.parametrize("most", [1, 2, 3])
def test_more_groups_than_a_kernel_takes_are_several_calls(
    counts: list[int], most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, bank, plan = setup(counts, torch.float32)
    wanted = result(x, bank, plan)
    monkeypatch.setattr(grouped, "_MOST_GROUPS", most)
    calls = []

    def limited(x_Ri: torch.Tensor, w_Eio: torch.Tensor, offs: torch.Tensor) -> torch.Tensor:
        calls.append(len(w_Eio))
        return torch.nn.functional.grouped_mm(x_Ri, w_Eio, offs=offs)

    monkeypatch.setattr(grouped, "F", SimpleNamespace(grouped_mm=limited))
    for ours, plain in zip(result(x, bank, plan), wanted, strict=True):
        torch.testing.assert_close(ours, plain)
    assert calls
    assert max(calls) <= most
