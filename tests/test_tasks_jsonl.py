from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from glider_dist.errors import GliderError
from glider_dist.tasks.jsonl import read_tasks
from glider_dist.tasks.task import Task

RECORD = {"name": "toy", "definition": "Say good or bad.", "split": "held_in", "metric": "exact_match"}
LINES = [
    {"id": "toy-0", "input": "fine", "target": "good"},
    {"id": "toy-1", "input": "ugly", "target": "bad"},
]


def _write(folder: Path, lines: list[Any], part: str = "train", name: str = "toy", **record: Any) -> Path:
    """A folder with one task. Lines that are strings are written as they are."""
    text = "".join(
        (line if isinstance(line, str) else json.dumps(line, ensure_ascii=False)) + "\n" for line in lines
    )
    path = folder / "tasks" / name / f"{part}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    (folder / "tasks.json").write_text(
        json.dumps({"tasks": [{**RECORD, "name": name, **record}]}), encoding="utf-8"
    )
    return path


def _only(folder: Path, limit: int | None = None) -> Task:
    (task,) = read_tasks(folder, limit)
    return task


def test_a_task_is_read_with_its_texts_and_examples(tmp_path):
    _write(tmp_path, LINES, category="Toys")
    wordings = {"toy": {"expert_descriptions": ["Judges."], "query_instructions": ["Judge it.", "good or bad?"]}}
    (tmp_path / "instructions.json").write_text(json.dumps(wordings), encoding="utf-8")
    task = _only(tmp_path)
    assert (task.name, task.split, task.metric, task.category) == ("toy", "held_in", "exact_match", "Toys")
    assert task.descriptions == ("Judges.",)
    assert task.instructions == ("Judge it.", "good or bad?")
    assert [(e.id, e.input, e.target, e.targets, e.choices) for e in task.examples("train")] == [
        ("toy-0", "fine", "good", ("good",), None),
        ("toy-1", "ugly", "bad", ("bad",), None),
    ]


def test_without_instructions_a_task_has_neither_descriptions_nor_instructions(tmp_path):
    _write(tmp_path, LINES)
    assert _only(tmp_path).descriptions == _only(tmp_path).instructions == ()


def test_the_target_comes_first_among_the_accepted_answers_and_none_is_repeated(tmp_path):
    _write(tmp_path, [{**LINES[0], "targets": ["fine", "good", "well"]}])
    assert _only(tmp_path).examples("train")[0].targets == ("good", "fine", "well")


def test_choices_of_the_task_serve_lines_without_their_own(tmp_path):
    _write(tmp_path, [LINES[0], {**LINES[1], "choices": ["bad", "worse"]}], choices=["good", "bad"])
    assert [e.choices for e in _only(tmp_path).examples("train")] == [("good", "bad"), ("bad", "worse")]


@pytest.mark.parametrize("choices", [None, "per instance"])
def test_choices_that_are_not_a_list_are_left_to_the_lines(tmp_path, choices):
    _write(tmp_path, LINES, choices=choices)
    assert _only(tmp_path).examples("train")[0].choices is None


def test_only_the_split_that_is_asked_for_is_read(tmp_path):
    _write(tmp_path, ["not json"], part="train")
    _write(tmp_path, LINES, part="test")
    task = _only(tmp_path)
    assert len(task.examples("test")) == 2
    with pytest.raises(GliderError, match="not JSON"):
        task.examples("train")


def test_a_line_separator_inside_a_string_does_not_end_the_line(tmp_path):
    _write(tmp_path, [{**LINES[0], "input": "one\u2028two\x85three"}])
    assert _only(tmp_path).examples("train")[0].input == "one\u2028two\x85three"


def test_blank_lines_a_byte_order_mark_and_windows_line_ends_are_harmless(tmp_path):
    path = _write(tmp_path, LINES)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n") + b"\r\n")
    assert len(_only(tmp_path).examples("train")) == 2


def test_a_limit_takes_a_sample_of_a_sorted_file_that_larger_limits_extend(tmp_path):
    _write(
        tmp_path,
        [{"id": f"toy-{n}", "input": f"{n}", "target": "good" if n < 50 else "bad"} for n in range(100)],
    )
    few, more = (_only(tmp_path, limit).examples("train") for limit in (10, 30))
    assert (len(few), len(more)) == (10, 30)
    assert {example.target for example in few} == {"good", "bad"}
    assert {e.id for e in few} <= {e.id for e in more}


def test_the_first_examples_of_a_file_that_is_sorted_by_target_have_every_label(tmp_path):
    lines = [{"id": f"toy-{n}", "input": f"{n}", "target": "abc"[n // 40]} for n in range(120)]
    _write(tmp_path, lines)
    examples = _only(tmp_path).examples("train")
    assert {example.target for example in examples[:12]} == {"a", "b", "c"}
    assert sorted(int(example.input) for example in examples) == list(range(120))


def test_a_file_that_is_not_sorted_by_target_keeps_its_order(tmp_path):
    lines = [{"id": f"toy-{n}", "input": f"{n}", "target": "ab"[n // 2 % 2]} for n in range(6)]
    _write(tmp_path, lines)
    assert [int(example.input) for example in _only(tmp_path).examples("train")] == list(range(6))


@pytest.mark.parametrize(
    ("name", "record"),
    [("bigbench_x", {}), ("bbh_x", {}), ("word_unscrambling", {"provenance": "bigbench"})],
)
def test_big_bench_tasks_are_for_evaluation_only(tmp_path, name, record):
    _write(tmp_path, LINES, part="test", name=name, split="held_out", **record)
    assert _only(tmp_path).evaluation_only


def test_other_tasks_may_be_trained_on(tmp_path):
    _write(tmp_path, LINES, provenance="converted")
    assert not _only(tmp_path).evaluation_only


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"id": "toy-2", "input"', "this is not JSON"),
        ("[1, 2]", "a line must be an object"),
        ({"input": "x", "target": "good"}, "the example has no id"),
        ({"id": "toy-2", "target": "good"}, "the example has no input"),
        ({"id": "toy-2", "input": "x"}, "the example has no target"),
        ({"id": "", "input": "x", "target": "good"}, "id is empty"),
        ({"id": "toy-2", "input": "  ", "target": "good"}, "input is empty"),
        ({"id": "toy-2", "input": "x", "target": ""}, "target is empty"),
        ({"id": "toy-2", "input": "x", "target": 3}, "target is 3, but must be text"),
        (
            {"id": "toy-2", "input": "x", "target": "no", "choices": ["a"]},
            "the target 'no' is not among the choices",
        ),
        ({"id": "toy-2", "input": "x", "target": "a", "choices": "a"}, "choices must be a list"),
        ({"id": "toy-2", "input": "x", "target": "a", "targets": ["a", 1]}, "targets must be a list"),
        ({"id": "toy-0", "input": "x", "target": "good"}, "the id 'toy-0' is already used in line 1"),
    ],
)
def test_a_malformed_line_is_reported_with_file_and_line(tmp_path, line, message):
    path = _write(tmp_path, [LINES[0], line])
    with pytest.raises(GliderError) as error:
        _only(tmp_path).examples("train")
    assert str(error.value).startswith(f"{path}, line 2: {message}")


@pytest.mark.parametrize("text", ["", "\n\n"])
def test_an_empty_file_is_reported(tmp_path, text):
    path = _write(tmp_path, [])
    path.write_text(text, encoding="utf-8")
    with pytest.raises(GliderError, match=r"train.jsonl is empty"):
        _only(tmp_path).examples("train")


def test_a_file_that_is_not_utf8_is_reported(tmp_path):
    path = _write(tmp_path, LINES)
    path.write_bytes("é".encode("latin-1"))
    with pytest.raises(GliderError, match=r"train.jsonl is not UTF-8"):
        _only(tmp_path).examples("train")


def test_a_missing_split_is_reported_with_its_path(tmp_path):
    _write(tmp_path, LINES, part="test")
    with pytest.raises(GliderError, match=r"'toy' has no train split: .*train.jsonl does not exist"):
        _only(tmp_path).examples("train")


def test_a_missing_folder_and_a_folder_without_an_index_are_reported(tmp_path):
    with pytest.raises(GliderError, match="there is no such folder"):
        read_tasks(tmp_path / "nowhere", None)
    with pytest.raises(GliderError, match=r"has no tasks.json"):
        read_tasks(tmp_path, None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "line 1 is not valid JSON"),
        ("[]", "must hold a JSON object"),
        ('{"tasks": []}', "must be an object with a list of tasks"),
        ('{"tasks": [{"definition": "x"}]}', "task number 1 must be an object with a name"),
        ('{"tasks": [{"name": "toy", "split": "held_in"}]}', "'toy' has no definition"),
        ('{"tasks": [{"name": "toy", "definition": "x", "split": "train"}]}', "must be held_in or held_out"),
        (
            '{"tasks": [{"name": "toy", "definition": "x", "split": "held_in", "metric": "f1"}]}',
            "must be exact_match or rouge_l",
        ),
        (
            '{"tasks": [{"name": "toy", "definition": "x", "split": "held_in", "choices": [1]}]}',
            "choices of 'toy'",
        ),
    ],
)
def test_a_malformed_index_is_reported(tmp_path, text, message):
    (tmp_path / "tasks.json").write_text(text, encoding="utf-8")
    with pytest.raises(GliderError, match=message):
        read_tasks(tmp_path, None)


@pytest.mark.parametrize("text", ["[]", '{"toy": []}', '{"toy": {"query_instructions": "x"}}', "{"])
def test_a_malformed_instructions_file_is_reported(tmp_path, text):
    _write(tmp_path, LINES)
    (tmp_path / "instructions.json").write_text(text, encoding="utf-8")
    with pytest.raises(GliderError, match=r"instructions.json"):
        read_tasks(tmp_path, None)
