"""On a real GPU, against the CPU: ``pytest --gpu`` runs these tests and no others, which see no GPU."""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import device_cases
import pytest
import torch
from device_cases import MASK, ROUTERS
from small_jobs import (
    HELD_IN,
    Outcome,
    adapters,
    command,
    finish,
    free_port,
    largest_difference,
    program,
    settings,
    start,
    write_tasks,
)
from test_parity import FIXTURES, error, load, make_pool, router_for

import glider_dist as gd
from glider_dist.lora.grouped import grouped_product, is_one_kernel
from glider_dist.testing import random_pool, tiny_causal

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda", 0)


@pytest.mark.parametrize(("name", "experts"), [("llama", 5), ("llama", 40), ("t5", 12)])
@pytest.mark.parametrize("router", ROUTERS)
def test_a_forward_is_the_cpus(alone, pool_of, router, name, experts):
    (both,) = alone.run(device_cases.serve, "gpu", name, pool_of(name, experts).path, ROUTERS[router])
    assert both.error < 1e-4
    ours = {MASK: 2 if name == "t5" else 1}
    assert {**both.ours, **ours} == both.ours
    # LAG's norms are products by group, which only half precision has as one kernel.
    assert both.ours == ours or router == "lag"


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_generation_gives_the_tokens_and_counts_of_the_cpu(alone, pool_of, name):
    (both,) = alone.run(device_cases.serve, "gpu", name, pool_of(name, 12).path, {}, None, True)
    assert both.error == 0


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_choices_and_likelihoods_are_those_of_the_cpu(alone, pool_of, name):
    (both,) = alone.run(device_cases.rank, "gpu", name, pool_of(name).path)
    assert both.cpu[0].tolist() == both.far[0].tolist()
    assert both.error < 1e-4


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", ["expert", "gate"])
def test_co_training_gives_the_weights_of_the_cpu(alone, kind, checkpointing):
    ((both, forwards),) = alone.run(device_cases.train, "gpu", kind, checkpointing)
    print(f"{forwards} forwards, waits {dict(both.waits)}")
    assert both.error < 1e-3


@pytest.mark.parametrize(
    ("dispatch", "router"), [("all_to_all", {}), ("gather", {}), ("auto", {}), ("local", {"shortlist": 3})]
)
def test_a_pool_shared_by_two_ranks_gives_the_cpus_results(two, pool_of, dispatch, router):
    pool = pool_of("llama", 12)
    for both in two.run(device_cases.serve, "gpu", "llama", pool.path, router, dispatch):
        assert both.error < 1e-4
        # A tiny Llama's layer has four groups of layers that read the same input.
        exchanges = 0 if dispatch == "local" else 4 * 2
        assert both.ours == {MASK: 1} | ({"parallel.exchange.to_host": exchanges} if exchanges else {})
    for both in two.run(device_cases.serve, "gpu", "llama", pool.path, router, dispatch, True):
        assert both.error == 0


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("strategy", ["all_to_all", "gather", "auto"])
def test_an_exchange_and_its_backward_give_the_cpus_results(two, strategy, frozen):
    for both, stated in two.run(device_cases.exchange, "gpu", strategy, frozen):
        print(f"stated {stated}, waits {dict(both.waits)}")
        assert both.error < 1e-5
        assert both.ours["parallel.exchange.to_host"] == stated == 1


@pytest.mark.parametrize("name", FIXTURES)
def test_every_routing_mode_matches_the_published_layer(name, tmp_path):
    folder, model, inputs, expected, meta = load(name)
    inputs = {key: value.to(CUDA) for key, value in inputs.items()}
    gd.attach_pool(model.to(CUDA), make_pool(folder, tmp_path / "pool"), gd.RouterConfig(kind="phatgoose"))
    names = ("input_ids", "attention_mask", "decoder_input_ids")
    for mode in sorted({key.rsplit(".", 1)[0] for key in expected} - {"base"}):
        if mode.startswith("single"):
            continue
        gd.set_router(model, router_for(mode))
        gd.reset_routing_stats(model)
        with torch.no_grad(), gd.query_scores(model, inputs["global_similarity"]):
            logits = model(**{name: inputs[name] for name in names if name in inputs}).logits
        counts = torch.stack([gd.routing_stats(model)[site] for site in meta["sites"]])
        assert error(logits, expected[f"{mode}.logits"].to(CUDA), inputs) < 1e-4, mode
        assert torch.equal(counts.cpu(), expected[f"{mode}.counts"].cpu().to(counts.dtype)), mode


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("experts", [5, 1023, 1500])
def test_products_of_groups_and_their_gradients_are_those_of_float64(dtype, experts):
    draw = torch.Generator().manual_seed(0)
    counts = torch.randint(0, 4, (experts,), generator=draw)
    counts[1] = 0
    ends = counts.cumsum(0, dtype=torch.int32)
    x = torch.randn(int(ends[-1]), 64, generator=draw).to(dtype)
    w = torch.randn(experts, 64, 16, generator=draw).to(dtype)

    def made(device: torch.device, dtype: torch.dtype) -> list[torch.Tensor]:
        leaves = [tensor.to(device, dtype).requires_grad_() for tensor in (x, w)]
        out = grouped_product(leaves[0], leaves[1], ends.to(device))
        return [out, *torch.autograd.grad(out.square().sum(), leaves)]

    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for found, wanted in zip(made(CUDA, dtype), made(torch.device("cpu"), torch.float64), strict=True):
        assert (found.cpu().double() - wanted).norm() <= tolerance * wanted.norm()


def test_a_hopper_or_blackwell_gpu_computes_groups_in_one_kernel():
    assert is_one_kernel(CUDA, torch.bfloat16) == (torch.cuda.get_device_capability()[0] in (9, 10))
    assert not is_one_kernel(CUDA, torch.float32)


class Job:
    """A small job whose commands run in one process, one after another."""

    def __init__(self, folder: Path, base: Path, device: str, process: ProcessPoolExecutor):
        self.folder, self.base, self.device, self.process = folder, base, device, process
        folder.mkdir()
        write_tasks(folder / "tasks")

    @property
    def path(self) -> Path:
        return self.folder / "pool"

    @property
    def pool(self) -> gd.ExpertPool:
        return gd.ExpertPool.open(self.path)

    def words(self, **changes: Any) -> list[str]:
        return settings(self.folder, **{"base": self.base, "device": self.device, **changes})

    def run(self, stage: str, expected: int = 0, **changes: Any) -> Outcome:
        outcome = self.process.submit(command, stage, *self.words(**changes)).result()
        assert outcome.code == expected, outcome.err
        return outcome


@pytest.fixture(scope="module")
def processes() -> Iterator[dict[str, ProcessPoolExecutor]]:
    """One for each device: DeepSpeed decides for one when it is imported."""
    spawn = multiprocessing.get_context("spawn")
    made = {device: ProcessPoolExecutor(1, spawn) for device in ("cpu", "cuda")}
    yield made
    for process in made.values():
        process.shutdown()


@pytest.fixture
def job_on(tmp_path: Path, base: Path, processes: dict[str, ProcessPoolExecutor]) -> Callable[..., Job]:
    return lambda device, name="": Job(tmp_path / (name or device), base, device, processes[device])


@pytest.mark.parametrize("zero_stage", [0, 3])
def test_all_stages_give_the_cpus_pool(job_on, zero_stage):
    near, far = job_on("cpu"), job_on("cuda")
    for stage in ("train-experts", "train-gates", "describe", "index", "calibrate", "evaluate"):
        near.run(stage)
        far.run(stage, zero_stage=zero_stage)
    assert largest_difference(adapters(near.path), adapters(far.path)) < 1e-3
    losses = [
        [job.pool.expert(name).card()["scores"]["validation_loss"] for name in HELD_IN] for job in (near, far)
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


@pytest.mark.parametrize("changes", [{"train__moments": "host"}, {"train__gradient_checkpointing": True}])
def test_ways_to_save_memory_change_nothing(job_on, changes):
    plain, other = job_on("cuda", "plain"), job_on("cuda", "other")
    plain.run("train-experts")
    other.run("train-experts", **changes)
    assert largest_difference(adapters(plain.path), adapters(other.path)) < 1e-3


def test_a_job_that_was_stopped_goes_on_to_the_same_pool(job_on):
    whole, stopped = job_on("cuda", "whole"), job_on("cuda", "stopped")
    whole.run("train-experts", train__max_steps=12)
    stopped.run("train-experts", expected=85, train__max_steps=12, max_minutes=1e-4)
    stopped.run("train-experts", train__max_steps=12)
    assert largest_difference(adapters(whole.path), adapters(stopped.path)) < 1e-3


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_joint_training_ends_where_the_cpu_does(job_on, zero_stage):
    near, far = job_on("cpu"), job_on("cuda")
    changes = {"joint__steps": 5, "joint__batch_size": 7, "train__learning_rate": 2e-3}
    routing = {"router__alpha_in": 3.0, "router__alpha_out": 1.0, "train__micro_batch_size": 4}
    for job in (near, far):
        random_pool(job.path, tiny_causal(), list(HELD_IN), ranks=[4, 3, 9], base=str(job.base))
        for stage in ("describe", "index"):
            job.run(stage)
        job.run("train-joint", **changes, **routing, zero_stage=zero_stage if job is far else 0)
    losses = [
        [point[1] for point in job.pool.expert("copy").card()["joint"][-1]["validation"]] for job in (near, far)
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert largest_difference(adapters(near.path), adapters(far.path)) < 1e-3


def test_a_rank_without_a_gpu_is_refused(job_on):
    ranks = {"RANK": "1", "LOCAL_RANK": str(torch.cuda.device_count()), "WORLD_SIZE": "2"}
    words = [sys.executable, "-m", "glider_dist", "train-experts", *job_on("cuda").words()]
    outcome = finish(start(words, Path.cwd(), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()), **ranks))
    assert outcome.code == 2
    assert "start fewer ranks" in outcome.err


def test_a_run_under_the_launcher_names_its_gpu(job_on):
    job = job_on("cuda")
    words = [program("deepspeed"), "--num_gpus", "1", "--master_port", str(free_port()), "--module", "glider_dist"]
    outcome = finish(start([*words, "train-experts", *job.words()], job.folder, DS_ACCELERATOR="cuda"))
    assert outcome.code == 0, outcome.err
    assert torch.cuda.get_device_name() in outcome.err
    assert job.pool.names == tuple(sorted(HELD_IN))
