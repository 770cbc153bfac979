"""Joint training's saves: what is left to go on from where some were cut off."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import ANY

import pytest
import torch

from glider_dist.config import TrainConfig
from glider_dist.lora.bank import SiteBank
from glider_dist.parallel.ranks import ALONE
from glider_dist.training.checkpoint import Checkpoints
from glider_dist.training.deepspeed_moe import MOMENTS
from glider_dist.training.joint_keep import JointKeeper
from glider_dist.training.joint_loop import Progress
from glider_dist.training.joint_params import Trained
from glider_dist.training.joint_state import gather_state

NAMES = ("one", "two")


class Engine:
    """Parameters and moments in a dict."""

    def __init__(self, values: dict[str, torch.Tensor]):
        self.steps = 0
        self.kept = {(key, moment): value for key, value in values.items() for moment in (None, *MOMENTS)}

    def full(self, key: str, moment: str | None = None) -> torch.Tensor:
        return self.kept[key, moment].clone()

    def set_full(self, key: str, value: torch.Tensor, moment: str | None = None) -> None:
        self.kept[key, moment] = value


def keeper(folder: Path, rank: int = 0) -> JointKeeper:
    """Of a new process; of a replica, if not of rank 0."""
    eligible = torch.ones(2, dtype=torch.bool)
    bank = SiteBank(torch.zeros(2, 8, 3), torch.zeros(2, 8, 4), torch.ones(2), eligible, (4, 8))
    context: Any = SimpleNamespace(names=NAMES, banks={"q": bank}, gates={"q": torch.zeros(2, 3)}, dispatch=None)
    trained = Trained(context, range(2), [], True, True)
    job: Any = SimpleNamespace(
        cfg=SimpleNamespace(train=TrainConfig()),
        mesh=SimpleNamespace(rank=rank, replica_ranks=(0, 1)),
        ranks=replace(ALONE, rank=rank),
        checkpoints=lambda part, keep: Checkpoints(folder / part, keep),
    )
    loop: Any = SimpleNamespace(progress=Progress(), extras=SimpleNamespace(loads={}))
    experts, gates = trained.initial()
    engine: Any = Engine({**experts, **gates})
    return JointKeeper(job, engine, trained, loop, {"facts": "the same"})


def save(kept: JointKeeper, step: int, only: tuple[str, ...] = (*NAMES, "job")) -> None:
    """``only``: what was written when the process was killed."""
    for files in (kept.experts, kept.shared):
        files.write = cut_off(files.write, only)  # type: ignore[method-assign]
    kept.loop.progress.step = step
    kept.save(None)
    kept.wait()


def cut_off(write: Any, only: tuple[str, ...]) -> Any:
    return lambda name, *rest: write(name, *rest) if name in only else None


def gone_on(folder: Path) -> JointKeeper:
    kept = keeper(folder)
    kept.restore()
    return kept


def test_two_saves_in_a_row_that_were_cut_off_leave_the_step_that_all_files_have(tmp_path: Path):
    kept = gone_on(tmp_path)
    save(kept, 50)
    save(kept, 100)
    for cut in (150, 170, 120):
        kept = gone_on(tmp_path)
        assert kept.loop.progress.step == 100
        save(kept, cut, only=("one",))
    kept = gone_on(tmp_path)
    save(kept, 110)
    assert [kept.experts.steps(name) for name in NAMES] == [[110, 100]] * 2
    assert kept.shared.steps("job") == [110, 100]
    assert gone_on(tmp_path).loop.progress.step == 110


def test_a_file_of_a_save_that_was_cut_off_is_never_taken_for_one_of_a_later_save(tmp_path: Path):
    save(gone_on(tmp_path), 100)
    save(gone_on(tmp_path), 150, only=("one",))
    save(gone_on(tmp_path), 150, only=("two", "job"))
    assert gone_on(tmp_path).loop.progress.step == 100


def test_files_without_a_common_step_are_told_of_and_go_with_the_first_save(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    with caplog.at_level(logging.WARNING):
        save(gone_on(tmp_path), 100, only=("one", "job"))
        assert not caplog.records
        kept = gone_on(tmp_path)
    (record,) = caplog.records
    wanted = (
        f"no step in {tmp_path / 'joint'} has the files of all experts and of the job; the training starts anew"
    )
    assert record.getMessage() == wanted
    assert kept.loop.progress.step == 0
    assert kept.experts.steps("one") == [100]
    save(kept, 120)
    assert [kept.experts.steps(name) for name in NAMES] == [[120], [120]]


def test_a_replica_takes_part_in_saving_and_keeps_nothing_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    first, replica = keeper(tmp_path), keeper(tmp_path, rank=1)
    asked: dict[JointKeeper, list[Any]] = {first: [], replica: []}
    for kept, keys in asked.items():
        full = kept.engine.full

        def noted(*key: Any, full: Any = full, keys: list[Any] = keys) -> torch.Tensor:
            keys.append(key)
            return full(*key)

        monkeypatch.setattr(kept.engine, "full", noted)
        kept.restore()
        kept.loop.progress.step = 5
        found = gather_state(kept.engine, kept.trained, moments=False, keep=kept.writes)
        assert found.keys() == (set(NAMES) if kept is first else set())
        kept.save(found)
        kept.wait()
    assert asked[replica] == asked[first] != []
    assert first.restore() == {name: {"q.A": ANY, "q.B": ANY, "q.gate": ANY} for name in NAMES}
    assert replica.restore() == {}
    assert first.loop.progress.step == replica.loop.progress.step == 5
