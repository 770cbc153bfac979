"""What a GPU would run, on a device that is not the CPU: the same results, no tensor in the wrong place, no wait
for the device but those that are documented."""

from __future__ import annotations

import device_cases
import pytest
from device_cases import MASK, ROUTERS

# One router of each kind of waiting, and all of them where a forward is the shortest.
KINDS = ("glider", "top-p", "arrow_general", "lag", "ties")
FORWARDS = [
    pytest.param(
        name, experts, router, marks=() if experts == 5 or router in KINDS else pytest.mark.slow,
        id=f"{router}-{name}-{experts}",
    )
    for name, experts in (("llama", 5), ("llama", 40), ("t5", 12))
    for router in ROUTERS
]  # fmt: skip


@pytest.mark.parametrize(("name", "experts", "router"), FORWARDS)
def test_a_forward_is_the_cpus_and_waits_only_for_its_mask(alone, pool_of, router, name, experts):
    (both,) = alone.run(device_cases.serve, "standin", name, pool_of(name, experts).path, ROUTERS[router])
    assert both.error < 1e-4
    # Where rows are sorted (40 experts), unused places cost each of the 14 layers a wait.
    ragged = {"lora.plan.plan_rows": 14} if experts == 40 and router in ("top-p", "arrow_general", "lag") else {}
    assert both.ours == {MASK: 2 if name == "t5" else 1} | ragged


def test_a_routed_layer_is_a_dozen_kernels(alone, pool_of):
    (both,) = alone.run(device_cases.count_kernels, "standin", pool_of("llama", 12).path)
    # Its own product, eleven more, and for each input that layers share a cast and a normalisation.
    assert 0 < both.kernels <= 12.5 * 14


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_generation_gives_the_tokens_and_counts_of_the_cpu(alone, pool_of, name):
    (both,) = alone.run(device_cases.serve, "standin", name, pool_of(name, 12).path, {}, None, True)
    assert both.error == 0


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_choices_and_likelihoods_are_those_of_the_cpu(alone, pool_of, name):
    (both,) = alone.run(device_cases.rank, "standin", name, pool_of(name).path)
    assert both.cpu[0].tolist() == both.far[0].tolist()
    assert both.error < 1e-4


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("dispatch", "router"), [("all_to_all", {}), ("gather", {}), ("auto", {}), ("local", {"shortlist": 3})]
)
def test_a_pool_shared_by_two_ranks_waits_once_an_exchange(two, pool_of, dispatch, router):
    pool = pool_of("llama", 12)
    for both in two.run(device_cases.serve, "standin", "llama", pool.path, router, dispatch):
        assert both.error < 1e-4
        # A tiny Llama's layer has four groups of layers that read the same input.
        exchanges = 0 if dispatch == "local" else 4 * 2
        assert both.ours == {MASK: 1} | ({"parallel.exchange.to_host": exchanges} if exchanges else {})
    for both in two.run(device_cases.serve, "standin", "llama", pool.path, router, dispatch, True):
        assert both.error == 0


@pytest.mark.distributed
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("strategy", ["all_to_all", "gather", "auto"])
def test_an_exchange_and_its_backward_wait_as_often_as_they_count(two, strategy, frozen):
    for both, stated in two.run(device_cases.exchange, "standin", strategy, frozen):
        assert both.error < 1e-5
        assert both.ours == {"parallel.exchange.to_host": stated}
        assert stated == 1


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", ["expert", "gate"])
def test_co_training_gives_the_weights_of_the_cpu_and_waits_twice_a_step(alone, kind, checkpointing):
    ((both, forwards),) = alone.run(device_cases.train, "standin", kind, checkpointing)
    assert both.error < 1e-3
    # Four steps, and a validation of each of three experts, whose best weights are then copied.
    assert both.ours == {
        MASK: forwards,
        "training.cotrain._nll": 4 + 3,
        "training.adamw.row_norms": 4,
        "training.trainee.validated": 3,
    }


def test_a_tensor_in_the_wrong_place_would_be_seen(alone):
    alone.run(device_cases.mistakes)
