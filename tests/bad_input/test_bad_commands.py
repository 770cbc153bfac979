"""A wrong command line or config is told in one sentence, and nothing is written."""

from __future__ import annotations

from pathlib import Path

import pytest
from refusals import Refused, one_sentence, says
from small_jobs import command, snapshot


def test_an_unknown_key_is_refused_with_the_nearest_one(refused: Refused) -> None:
    says(refused("train-experts", "train.max_step=3"), "command line", "'train.max_step'", "'train.max_steps'")


def test_an_unknown_key_in_a_file_is_refused_with_the_file(refused: Refused, folder: Path) -> None:
    (folder / "job.yaml").write_text("lora:\n  ranks: 3\n")
    says(refused("train-experts", "job.yaml"), "job.yaml", "'lora.ranks'", "'lora.rank'")


def test_a_wrong_type_is_refused_with_the_type_that_is_expected(refused: Refused, folder: Path) -> None:
    says(refused("train-experts", "lora.rank=large"), "command line", "lora.rank", "int", "'large'")
    (folder / "job.yaml").write_text("tasks:\n  held_in: copy\n")
    says(refused("train-experts", "job.yaml"), "job.yaml", "tasks.held_in", "list of str")


@pytest.mark.parametrize(
    ("arguments", "needles"),
    [
        (["train-expert"], ["unknown command 'train-expert'", "train-experts"]),
        (["train-experts", "--rank", "2"], ["unknown flag --rank"]),
        (["quickstart", "--ranks", "two"], ["--ranks", "'two'"]),
        (["train-experts", "--ranks", "2"], ["--ranks", "quickstart"]),
        (["slurm", "submit", "--ranks", "2"], ["--ranks", "not to slurm", "slurm.nodes=N and slurm.ranks=M"]),
        (["evaluate", "--fresh"], ["--fresh belongs to quickstart, not to evaluate"]),
        (["runs", "--dry-run"], ["--dry-run", "not to runs"]),
        (["evaluate", "some text"], ["'some text'"]),
        (["evaluate", "gone.yaml"], ["gone.yaml does not exist"]),
        (["evaluate"], ["pool=FOLDER"]),
        (["predict", "pool=gone"], ["gone", "no pool.json"]),
    ],
)
def test_a_wrong_command_line_is_refused(
    arguments: list[str], needles: list[str], folder: Path, base: Path
) -> None:
    before = snapshot(folder)
    says(one_sentence(command(*arguments, f"base={base}", "device=cpu")), *needles)
    assert snapshot(folder) == before
