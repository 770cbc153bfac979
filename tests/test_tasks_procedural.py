from __future__ import annotations

import pickle
import re
from collections import Counter

import pytest

from glider_dist.errors import GliderError
from glider_dist.tasks.procedural import QUICKSTART_HELD_IN, QUICKSTART_HELD_OUT, make_tasks
from glider_dist.tasks.task import PARTS

TASKS = {task.name: task for task in make_tasks(seed=0, limit=None)}
NAMES = sorted(TASKS)


def _words(text: str) -> frozenset[str]:
    return frozenset(re.findall(r"[a-z0-9]+", text.lower()))


def _overlap(first: frozenset[str], second: frozenset[str]) -> float:
    return len(first & second) / len(first | second)


def test_there_are_enough_tasks_of_both_kinds():
    splits = Counter(task.split for task in TASKS.values())
    assert splits["held_in"] >= 14
    assert splits["held_out"] >= 7


def test_the_quickstart_tasks_exist_on_the_side_they_are_used_on():
    assert len(set(QUICKSTART_HELD_IN)) == 6
    assert len(set(QUICKSTART_HELD_OUT)) == 3
    assert {TASKS[name].split for name in QUICKSTART_HELD_IN} == {"held_in"}
    assert {TASKS[name].split for name in QUICKSTART_HELD_OUT} == {"held_out"}


@pytest.mark.parametrize("name", NAMES)
def test_every_task_has_two_descriptions_six_instructions_and_no_repetition_among_them(name):
    task = TASKS[name]
    assert len(task.descriptions) == 2
    assert len(task.instructions) == 6
    texts = {task.definition, *task.descriptions, *task.instructions}
    assert len(texts) == 9
    assert task.metric == "exact_match"


def test_no_instruction_of_any_task_repeats_a_description_or_definition_of_any_task():
    tasks = TASKS.values()
    experts = {text: _words(text) for task in tasks for text in (task.definition, *task.descriptions)}
    instructions = [text for task in tasks for text in task.instructions]
    assert len({" ".join(sorted(_words(text))) for text in instructions}) == len(instructions)
    near = [
        (instruction, text)
        for instruction in instructions
        for text, words in experts.items()
        if _overlap(_words(instruction), words) > 0.5
    ]
    assert near == []


@pytest.mark.parametrize("name", NAMES)
def test_parts_have_the_default_sizes_and_share_no_input(name):
    parts = {part: TASKS[name].examples(part) for part in PARTS}
    assert [len(parts[part]) for part in PARTS] == [512, 64, 64]
    inputs = [example.input for part in PARTS for example in parts[part]]
    assert len(set(inputs)) == len(inputs) == 640
    ids = [example.id for part in PARTS for example in parts[part]]
    assert len(set(ids)) == 640


@pytest.mark.parametrize("name", NAMES)
def test_no_input_of_a_test_is_a_training_input_under_another_seed(name):
    tested = {example.input for example in TASKS[name].examples("test")}
    for seed in (1, 2):
        other = next(task for task in make_tasks(seed, limit=None) if task.name == name)
        assert not tested & {example.input for part in ("train", "validation") for example in other.examples(part)}


@pytest.mark.parametrize("name", NAMES)
def test_inputs_and_answers_are_short_and_clean(name):
    for part in PARTS:
        for example in TASKS[name].examples(part):
            assert len(example.input.split()) <= 12
            assert 1 <= len(example.target.split()) <= 3
            assert example.input == example.input.strip()
            assert example.targets == (example.target,)
            assert example.choices is None or example.target in example.choices


@pytest.mark.parametrize("name", NAMES)
def test_no_answer_dominates_a_task(name):
    counts = Counter(example.target for example in TASKS[name].examples("train"))
    assert counts.most_common(1)[0][1] <= 0.56 * 512


def test_the_same_seed_gives_the_same_examples_and_another_seed_gives_others():
    again, other = (next(t for t in make_tasks(seed, None) if t.name == "giver") for seed in (0, 1))
    assert again.examples("train") == TASKS["giver"].examples("train")
    first, second = ({example.input for example in task.examples("train")} for task in (again, other))
    assert len(first & second) < 0.1 * len(first)


def test_the_examples_do_not_change_between_versions():
    # Fixed values: they would silently change every published score.
    assert [(e.input, e.target) for e in TASKS["date_in_words"].examples("test")[:2]] == [
        ("1959-07-25", "25 July 1959"),
        ("1957-12-27", "27 December 1957"),
    ]


def test_a_limit_applies_to_every_part_and_a_smaller_one_gives_the_first_of_the_same_examples():
    small, large = (next(t for t in make_tasks(0, limit) if t.name == "opposite") for limit in (5, 100))
    for part in PARTS:
        assert small.examples(part) == large.examples(part)[:5]
        assert len(large.examples(part)) == 100


def test_a_limit_beyond_the_different_inputs_of_a_task_is_an_error():
    task = next(t for t in make_tasks(0, limit=2000) if t.name == "next_weekday")
    with pytest.raises(
        GliderError, match=r"'next_weekday' has no 2000 different inputs for test .* lower tasks.limit"
    ):
        task.examples("test")


def test_every_task_has_at_least_two_thousand_different_inputs():
    for task in make_tasks(0, limit=1600):
        assert len(task.examples("train")) == 1600
    for task in make_tasks(0, limit=200):
        assert len(task.examples("validation")) == len(task.examples("test")) == 200


def test_a_task_can_be_sent_to_another_process():
    task = pickle.loads(pickle.dumps(make_tasks(0, limit=3)[0]))
    assert task.examples("test") == make_tasks(0, limit=3)[0].examples("test")


@pytest.mark.parametrize(
    ("name", "input", "target"),
    [
        ("next_weekday", "Sunday", "Monday"),
        ("next_month", "December", "January"),
        ("digits_to_ordinal", "20 ", "twentieth"),
        ("digits_to_words", "40 ", "forty"),
    ],
)
def test_edge_cases_of_cycles_occur_with_the_right_answer(name, input, target):
    task = next(t for t in make_tasks(0, limit=1000) if t.name == name)
    hits = [example for example in task.examples("train") if input in example.input]
    assert hits
    assert any(example.target.startswith(target) for example in hits)


def test_largest_and_larger_number_answer_with_the_maximum():
    for name in ("larger_number", "largest_of_three"):
        for example in TASKS[name].examples("train"):
            assert int(example.target) == max(int(number) for number in re.findall(r"\d+", example.input))
