"""Settings that keep tests small and offline, and what many of them share."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from routed_cases import MODELS

import glider_dist as gd
from glider_dist.testing import LocalRanks, random_pool, save_tiny_base, tiny_causal

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
torch.set_num_threads(max(1, (os.cpu_count() or 2) // 2))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--slurm",
        action="store_true",
        help="run the tests on a real Slurm (as root on Debian)",
    )
    parser.addoption("--gpu", action="store_true", help="run the tests that need a GPU, and no others")


def pytest_configure(config: pytest.Config) -> None:
    if not config.getoption("--gpu"):
        # All other tests are of the CPU, with more ranks than most machines have GPUs.
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    wanted = config.getoption("--gpu")
    if wanted and not torch.cuda.is_available():
        raise pytest.UsageError("--gpu: torch sees no GPU here")
    left_out = [item for item in items if (item.get_closest_marker("gpu") is not None) != wanted]
    items[:] = [item for item in items if item not in left_out]
    config.hook.pytest_deselected(items=left_out)
    root_on_debian = os.geteuid() == 0 and shutil.which("apt-get") is not None
    if config.getoption("--slurm") or (os.environ.get("CI") and root_on_debian):
        return
    for item in items:
        if item.get_closest_marker("slurm"):
            item.add_marker(pytest.mark.skip(reason="brings up a real Slurm; run with --slurm"))


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny causal model on disk; tests only read it."""
    return save_tiny_base(tmp_path_factory.mktemp("base") / "tiny", tiny_causal())


@pytest.fixture(params=["sorted", "every"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How layers are computed: in the ways that have gradients, or as a test asks (``lora/ways.py``)."""
    monkeypatch.setattr("glider_dist.lora.ways.cheapest_way", lambda *_: request.param)
    return request.param


@pytest.fixture(scope="session")
def pool_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., gd.ExpertPool]:
    """A pool of ``experts`` random experts for one of MODELS, made once."""
    made: dict[tuple[str, int], gd.ExpertPool] = {}

    def find(name: str, experts: int = 5) -> gd.ExpertPool:
        if (name, experts) not in made:
            path = tmp_path_factory.mktemp(f"{name}_{experts}")
            made[name, experts] = random_pool(path, MODELS[name](), experts=experts)
        return made[name, experts]

    return find


@pytest.fixture(scope="session")
def local_ranks() -> Iterator[Callable[[int], LocalRanks]]:
    """Processes that form a gloo group, by their number: started once, since that takes seconds."""
    started: dict[int, LocalRanks] = {}

    def find(world: int) -> LocalRanks:
        return started.setdefault(world, LocalRanks(world))

    yield find
    for ranks in started.values():
        ranks.close()


@pytest.fixture(scope="module")
def alone() -> Iterator[LocalRanks]:
    """A process of this module's own: a device for which it computes would stay in those that others use."""
    with LocalRanks(1) as ranks:
        yield ranks


@pytest.fixture(scope="module")
def two() -> Iterator[LocalRanks]:
    """Two such processes over gloo; on a GPU they share it, as NCCL wants one for each rank."""
    with LocalRanks(2) as ranks:
        yield ranks
