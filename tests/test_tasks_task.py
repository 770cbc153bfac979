from __future__ import annotations

import pytest

from glider_dist.errors import GliderError
from glider_dist.tasks.prompt import answer, prompt
from glider_dist.tasks.task import Example, Task


def _example(number: int) -> Example:
    return Example(f"toy-{number}", f"input {number}", "yes", ("yes",), None)


def _task(
    instructions: tuple[str, ...] = (), evaluation_only: bool = False, calls: list[str] | None = None
) -> Task:
    def load(part: str) -> list[Example]:
        if calls is not None:
            calls.append(part)
        return [] if part == "validation" else [_example(1), _example(2)]

    return Task(
        "toy",
        "Say yes.",
        "held_in",
        "exact_match",
        "Toys",
        ("Says yes.",),
        instructions,
        evaluation_only,
        load,
        {},
    )


def _wordings(task: Task, part: str) -> set[str]:
    return {task.instruction(_example(number), part) for number in range(200)}


def test_training_and_validation_see_the_first_half_of_the_instructions_and_test_the_second():
    task = _task(tuple("abcdef"))
    assert _wordings(task, "train") == _wordings(task, "validation") == set("abc")
    assert _wordings(task, "test") == set("def")


@pytest.mark.parametrize("count", [2, 3, 5, 6, 7])
def test_no_test_instruction_is_ever_seen_in_training(count):
    task = _task(tuple("abcdefg"[:count]))
    assert not _wordings(task, "train") & _wordings(task, "test")
    assert _wordings(task, "train") | _wordings(task, "test") == set(task.instructions)


def test_without_instructions_the_definition_is_used_and_a_single_one_serves_every_part():
    assert _wordings(_task(), "test") == {"Say yes."}
    assert _wordings(_task(("only",)), "train") == _wordings(_task(("only",)), "test") == {"only"}


def test_the_instruction_of_an_example_never_changes():
    # Fixed values: a change of the hash would silently change every published score.
    task = _task(tuple("abcdef"))
    assert [task.instruction(_example(number), "test") for number in range(6)] == list("ddfeef")


def test_a_part_is_read_once_and_handing_it_out_does_not_expose_it():
    calls: list[str] = []
    task = _task(calls=calls)
    task.examples("train").clear()
    assert len(task.examples("train")) == 2
    assert calls == ["train"]


def test_an_empty_part_is_an_error_that_names_task_and_part():
    with pytest.raises(GliderError, match=r"'toy' has no examples in its validation split"):
        _task().examples("validation")


def test_an_unknown_part_is_an_error():
    with pytest.raises(GliderError, match=r"no split 'dev'"):
        _task().examples("dev")
    with pytest.raises(GliderError, match=r"no split 'dev'"):
        _task(tuple("ab")).instruction(_example(1), "dev")


@pytest.mark.parametrize("part", ["train", "validation"])
def test_an_evaluation_only_task_gives_its_test_examples_and_nothing_else(part):
    task = _task(evaluation_only=True)
    assert len(task.examples("test")) == 2
    with pytest.raises(GliderError, match="for evaluation only"):
        task.examples(part)


def test_the_prompt_ends_without_a_space_and_the_answer_starts_with_one():
    assert prompt("Say yes.", _example(1).input) == "Say yes.\nInput: input 1\nOutput:"
    assert prompt("Say yes.", None) == "Say yes.\nOutput:"
    assert answer("yes") == " yes"
