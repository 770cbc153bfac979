"""Checkpoints: files that prove themselves, and training that goes on from them on any mesh."""

from __future__ import annotations

import ast
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cotraining_worker as worker
import pytest
import rank_checkpoints as work
import torch

import glider_dist
from glider_dist.errors import GliderError
from glider_dist.parallel.replicas import Replicas
from glider_dist.testing import LocalRanks
from glider_dist.training.background import Background
from glider_dist.training.checkpoint import Checkpoints, Damaged
from glider_dist.training.unfinished import Interval, Unfinished

Found = dict[str, dict[str, Any]]
UNEVEN = {"one": 7, "two": 9, "three": 12, "four": 12, "five": 15, "six": 16}


def tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    made = torch.Generator().manual_seed(seed)
    return {
        "weights": torch.randn(3, 5, generator=made),
        "half": torch.randn(7, generator=made).bfloat16(),
        "updates": torch.tensor(4.0),
        "none": torch.zeros(0, 3),
    }


@pytest.fixture
def files(tmp_path: Path) -> Checkpoints:
    made = Checkpoints(tmp_path / "checkpoints")
    for step in (10, 20):
        made.write("expert_1", step, tensors(step), {"step": step, "losses": [0.1, float("inf")]})
    return made


def test_a_file_gives_back_what_was_written_and_nothing_else_is_there(files):
    part = files.read("expert_1", 20)
    assert part.record == {"step": 20, "losses": [0.1, float("inf")]}
    for key, value in tensors(20).items():
        assert torch.equal(part.tensors[key], value)
        assert part.tensors[key].dtype == value.dtype
    assert files.record("expert_1", 10)["step"] == 10
    assert files.names() == ["expert_1"]
    assert {path.name for path in (files.folder / "expert_1").iterdir()} == {
        "step-00000010.safetensors", "step-00000020.safetensors",
    }  # fmt: skip


def test_every_changed_bit_and_every_cut_is_noticed(files):
    path = files.path("expert_1", 20)
    whole = path.read_bytes()
    before = files.read("expert_1", 20)
    header = int.from_bytes(whole[:8], "little")
    harmless = 0
    for place in range(len(whole)):
        changed = bytearray(whole)
        changed[place] ^= 1 << (place % 8)
        path.write_bytes(bytes(changed))
        try:
            after = files.read("expert_1", 20)
        except Damaged:
            continue
        # The label "format": "pt" and the blanks that pad the header are nobody's content.
        harmless += 1
        assert 8 <= place < 8 + header
        assert after.record == before.record
        assert all(torch.equal(after.tensors[key], value) for key, value in before.tensors.items())
    assert harmless < 32
    for length in (0, 4, 100, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(Damaged):
            files.read("expert_1", 20)


def test_the_newest_ones_are_kept_and_those_of_a_training_that_was_given_up_go(files):
    files.write("expert_1", 30, tensors(), {})
    assert files.steps("expert_1") == [30, 20]
    files.write("expert_1", 5, tensors(), {})
    assert files.steps("expert_1") == [5]
    files.remove("expert_1")
    assert files.names() == []


def test_what_a_process_killed_while_it_deleted_has_left_is_no_checkpoint_and_goes(files):
    (files.folder / "expert_1").rename(files.folder / ".expert_1.17.abcd.old")
    assert files.names() == []
    files.clear_up()
    assert list(files.folder.iterdir()) == []


@pytest.mark.parametrize("name", ["../evil", "a/b", "/etc/x", "", ".hidden", "a\0b", "x" * 300])
def test_a_name_that_leads_elsewhere_is_refused(files, name):
    for call in (lambda: files.write(name, 1, {}, {}), lambda: files.read(name, 1), lambda: files.remove(name)):
        with pytest.raises(GliderError, match="name"):
            call()


def test_a_link_and_a_file_under_another_name_are_refused(files, tmp_path):
    (files.folder / "expert_2").mkdir()
    os.link(files.path("expert_1", 20), files.path("expert_2", 20))
    with pytest.raises(Damaged, match="expert_2"):
        files.read("expert_2", 20)
    files.path("expert_2", 20).unlink()
    files.path("expert_2", 20).symlink_to(files.path("expert_1", 20))
    with pytest.raises(GliderError, match="is a link"):
        files.read("expert_2", 20)


def test_what_fails_in_the_background_is_raised_at_the_next_look_and_ends_the_rest(tmp_path):
    background, done = Background(), []

    def fails() -> None:
        raise OSError(28, os.strerror(28), "somewhere/step-1.safetensors")

    background.submit(lambda: done.append(1), fails, lambda: done.append(2))
    with pytest.raises(GliderError, match=r"somewhere/step-1\.safetensors cannot be written \(No space left"):
        background.wait()
    background.close()
    assert done == [1]


def test_nothing_in_the_package_unpickles_but_the_import_of_foreign_adapters():
    package = Path(glider_dist.__file__).parent
    found = []
    for path in sorted(package.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and node.attr in ("load", "loads", "Unpickler"):
                owner = ast.unparse(node.value)
                if owner in ("torch", "pickle", "dill", "joblib", "cloudpickle", "np", "numpy"):
                    found.append(f"{path.relative_to(package)}: {owner}.{node.attr}")
    assert found == ["pool/published.py: torch.load"]
    assert "weights_only=True" in (package / "pool" / "published.py").read_text(encoding="utf-8")


# Co-training ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole() -> Found:
    """Never interrupted, in one process."""
    return work.cotrain(None, 0, None)


@pytest.fixture(scope="module")
def uneven() -> Found:
    """Experts that end one by one, in three slots."""
    return work.cotrain(None, 0, None, slots=3, steps=UNEVEN, eval_every=4)


def check_same(whole: Found, again: Found, after: int) -> None:
    """The same data in the same order from step ``after`` on, and losses within 1e-6 over the ten next steps."""
    assert again.keys() == whole.keys()
    for name, one in whole.items():
        assert again[name]["drawn"] == one["drawn"][after:]
        assert len(one["losses"]) >= after + 10
        assert again[name]["losses"][: after + 10] == pytest.approx(one["losses"][: after + 10], rel=1e-6)
        assert again[name]["best_step"] == one["best_step"]


@pytest.mark.jobs
@pytest.mark.parametrize(("world", "zero_stage"), [(1, 0), (2, 3), pytest.param(3, 0, marks=pytest.mark.slow)])
def test_two_ranks_are_killed_and_another_mesh_goes_on_with_the_same_losses(
    world: int, zero_stage: int, whole: Found, local_ranks: Callable[[int], LocalRanks], tmp_path: Path
) -> None:
    assert local_ranks(2).run(work.cotrain, str(tmp_path), 0, 9) == [{}, {}]
    if world == 1:
        parts = [work.cotrain(str(tmp_path), zero_stage, None)]
    else:
        parts = local_ranks(world).run(work.cotrain, str(tmp_path), zero_stage, None)
    check_same(whole, {name: one for part in parts for name, one in part.items()}, 8)
    assert [path.name for path in tmp_path.iterdir()] == ["done"]


@pytest.mark.parametrize(
    "kills", [[4], [8, 1, 3], *(pytest.param(kills, marks=pytest.mark.slow) for kills in ([10, 6], [13], [15, 2]))]
)
def test_killed_at_any_turn_the_same_mesh_gives_the_same_bits(kills, uneven, tmp_path):
    for turn in kills:
        assert work.cotrain(str(tmp_path), 0, turn, slots=3, steps=UNEVEN, eval_every=4) == {}
    assert work.cotrain(str(tmp_path), 0, None, slots=3, steps=UNEVEN, eval_every=4)
    for name, one in uneven.items():
        done = torch.load(work.done_file(str(tmp_path), name), weights_only=True)
        assert torch.equal(one["row"], done["row"])
        assert one["losses"] == done["losses"]
    assert [path.name for path in tmp_path.iterdir()] == ["done"]


def test_experts_go_on_in_the_slots_and_beside_the_experts_they_had(tmp_path):
    settings: dict[str, Any] = {"slots": 3, "steps": UNEVEN, "eval_every": 4}
    seen: list[list[dict[int, tuple[str, int]]]] = [[]]
    turn = work.CoTraining.turn

    def noted(self: Any) -> Any:
        seen[-1].append({slot: (one.name, one.progress.step) for slot, one in sorted(self._active.items())})
        return turn(self)

    work.CoTraining.turn = noted  # type: ignore[method-assign]
    try:
        work.cotrain(None, 0, None, **settings)
        for kill in (11, 5, None):
            seen.append([])
            work.cotrain(str(tmp_path), 0, kill, **settings)
    finally:
        work.CoTraining.turn = turn  # type: ignore[method-assign]
    never, first, second, third = seen
    assert [*first[:10], *second[:4], *third] == never


@pytest.mark.parametrize("damage", ["flipped", "cut"])
def test_a_damaged_checkpoint_is_named_and_the_older_one_serves(damage, uneven, tmp_path, caplog):
    settings: dict[str, Any] = {"slots": 3, "steps": UNEVEN, "eval_every": 4}
    work.cotrain(str(tmp_path), 0, 6, **settings)
    files = Checkpoints(tmp_path)
    name = files.names()[0]
    newest, older = files.steps(name)
    path = files.path(name, newest)
    content = bytearray(path.read_bytes())
    content[-9] ^= 4
    path.write_bytes(bytes(content[:-1]) if damage == "cut" else bytes(content))
    with caplog.at_level(logging.WARNING):
        again = work.cotrain(str(tmp_path), 0, None, **settings)
    said = [record.getMessage() for record in caplog.records]
    assert [text for text in said if str(path) in text and f"step {older} is tried" in text]
    # All that were beside it go back one step, too.
    assert {one["drawn"][0][0] for other, one in again.items() if other in ("one", "two", "three")} == {older + 1}
    for name, one in again.items():
        assert torch.equal(one["row"], uneven[name]["row"])


def test_with_no_good_checkpoint_an_expert_starts_anew_and_says_so(uneven, tmp_path, caplog):
    settings: dict[str, Any] = {"slots": 3, "steps": UNEVEN, "eval_every": 4}
    work.cotrain(str(tmp_path), 0, 6, **settings)
    for path in tmp_path.glob("one/*"):
        path.write_bytes(b"nothing")
    with caplog.at_level(logging.WARNING):
        again = work.cotrain(str(tmp_path), 0, None, **settings)
    assert "no checkpoint of one is good; its training starts anew" in caplog.text
    assert again["one"]["drawn"][0][0] == 1
    assert again["one"]["losses"] == pytest.approx(uneven["one"]["losses"], rel=1e-5)


def test_another_recipe_is_refused_with_what_changed_from_what_to_what(tmp_path):
    work.cotrain(str(tmp_path), 0, 4)
    with pytest.raises(GliderError) as failure:
        work.cotrain(str(tmp_path), 0, None, learning_rate=0.5)
    assert "learning_rate of its recipe changed from" in str(failure.value)
    assert "to 0.5 since the checkpoint of" in str(failure.value)
    assert "delete" in str(failure.value)


def test_a_file_that_must_not_be_read_is_an_error_and_not_a_new_start(tmp_path, monkeypatch):
    work.cotrain(str(tmp_path), 0, 4)

    def refused(*args: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("glider_dist.training.checkpoint.safe_open", refused)
    with pytest.raises(GliderError, match=r"cannot be read \(Permission denied\); make it readable"):
        work.keeper(tmp_path, list(worker.SIZES), work.ALONE).check()


def test_what_another_number_of_ranks_saved_later_goes_before_these_ranks_own(tmp_path):
    files = Checkpoints(tmp_path, keep_last=2)

    def job(teams: int) -> Unfinished:
        return Unfinished(files, {"X": {}, "Y": {}}, Interval(100, 10.0), Replicas(0, teams))

    def save(step: int, turn: int, teams: int) -> None:
        beside = {"X": [0, step], "Y": [1, step]}
        for name in beside:
            record = {"place": [0, teams], "turn": turn, "beside": beside}
            files.write(name, step, {"weights": torch.zeros(2)}, record)

    save(400, 400, teams=2)
    save(500, 500, teams=2)
    four = job(4)
    assert four.choose(8) == {"X": (500, None), "Y": (500, None)}
    assert four.turn == 500
    save(600, four.turn + 100, teams=4)
    two = job(2)
    assert two.choose(8) == {"X": (600, None), "Y": (600, None)}
    save(700, two.turn + 100, teams=2)
    assert job(2).choose(8) == {"X": (700, 0), "Y": (700, 1)}
