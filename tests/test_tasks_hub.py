from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from glider_dist.config import TasksConfig
from glider_dist.errors import GliderError
from glider_dist.tasks.source import load_tasks
from glider_dist.tasks.task import Task


def _data(folder: Path, **splits: list[dict[str, Any]]) -> dict[str, str]:
    files = {}
    for split, rows in splits.items():
        path = folder / f"{split}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        files[split] = str(path)
    return files


def _rows(count: int, start: int = 0) -> list[dict[str, Any]]:
    return [{"text": f" remark {n} ", "label": n % 2, "word": f"word{n}"} for n in range(start, start + count)]


def _task(folder: Path, limit: int | None = None, **record: Any) -> Task:
    task = {"name": "toy", "definition": "Judge.", "split": "held_in", "dataset": "json", **record}
    task = {"input": "Remark: {text}", "target": "label", "choices": ["bad", "good"], **task}
    path = folder / "mapping.json"
    path.write_text(json.dumps({"tasks": [task]}), encoding="utf-8")
    return load_tasks(TasksConfig(source="datasets", path=str(path), limit=limit), seed=0).held_in[0]


@pytest.fixture(autouse=True)
def _private_cache(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def test_columns_fill_the_template_and_labels_count_into_the_choices(tmp_path):
    files = _data(tmp_path, train=_rows(20), validation=_rows(4, 20), test=_rows(4, 24))
    task = _task(tmp_path, data_files=files, descriptions=["Judges remarks."], instructions=["Good or bad?"])
    first = task.examples("test")[0]
    assert (first.id, first.input, first.target) == ("toy-test-0", "Remark:  remark 24", "bad")
    assert first.choices == ("bad", "good")
    assert task.examples("validation")[1].target == "good"
    assert task.descriptions == ("Judges remarks.",)
    assert task.instruction(first, "test") == "Good or bad?"


def test_a_target_may_be_a_text_column_or_a_template(tmp_path):
    files = _data(tmp_path, train=_rows(20))
    column = _task(tmp_path, data_files=files, target="word", choices=None)
    assert column.examples("train")[0].target.startswith("word")
    template = _task(tmp_path, data_files=files, target="{word}-{label}", choices=None)
    assert template.examples("train")[0].target == column.examples("train")[0].target + "-" + str(
        int(column.examples("train")[0].target[4:]) % 2
    )


def test_a_local_folder_is_a_data_set_too(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    _data(folder, train=_rows(20), test=_rows(3, 20))
    assert len(_task(tmp_path, dataset=str(folder)).examples("test")) == 3


def test_without_a_validation_split_a_tenth_of_train_is_always_the_same_and_never_trained_on(tmp_path):
    files = _data(tmp_path, train=_rows(100), test=_rows(5, 100))
    task = _task(tmp_path, data_files=files)
    train, validation = task.examples("train"), task.examples("validation")
    assert (len(train), len(validation)) == (90, 10)
    assert not {e.id for e in train} & {e.id for e in validation}
    assert _task(tmp_path, data_files=files).examples("validation") == validation
    limited = _task(tmp_path, limit=20, data_files=files)
    assert {e.id for e in limited.examples("train")} <= {e.id for e in train}
    assert len(limited.examples("train")) == 20


def test_a_split_that_serves_as_test_never_serves_as_validation(tmp_path):
    files = _data(tmp_path, train=_rows(50), validation=_rows(6, 50))
    task = _task(tmp_path, data_files=files, split_names={"test": "validation"})
    assert len(task.examples("test")) == 6
    assert len(task.examples("validation")) == 5
    assert not {e.id for e in task.examples("test")} & {e.id for e in task.examples("validation")}


def test_a_missing_split_is_reported_with_those_that_exist(tmp_path):
    task = _task(tmp_path, data_files=_data(tmp_path, train=_rows(20)))
    with pytest.raises(GliderError, match=r"no split 'test' to serve as test; it has \['train'\]"):
        task.examples("test")


def test_a_validation_split_that_was_named_but_does_not_exist_is_reported(tmp_path):
    task = _task(tmp_path, data_files=_data(tmp_path, train=_rows(20)), split_names={"validation": "dev"})
    with pytest.raises(GliderError, match=r"no split 'dev' to serve as validation"):
        task.examples("validation")


@pytest.mark.parametrize("part", ["train", "validation"])
def test_a_split_that_serves_as_test_is_never_trained_on(tmp_path, part):
    task = _task(tmp_path, data_files=_data(tmp_path, train=_rows(20)), split_names={"test": "train"})
    assert len(task.examples("test")) == 20
    with pytest.raises(GliderError, match=rf"'train' serves as test, so it cannot serve as {part}"):
        task.examples(part)


def test_rows_without_a_label_or_an_input_are_left_out_with_a_warning(tmp_path, caplog):
    rows = _rows(8)
    # SNLI marks pairs without agreement with -1; text columns have nulls.
    rows[2]["label"], rows[3]["label"], rows[5]["text"] = -1, None, None
    files = _data(tmp_path, train=_rows(20), test=rows)
    examples = _task(tmp_path, data_files=files).examples("test")
    assert [example.id for example in examples] == [f"toy-test-{row}" for row in (0, 1, 4, 6, 7)]
    assert "3 of 8 rows of test lack an input or a target" in caplog.text


def test_rows_whose_template_gives_no_text_or_no_answer_are_left_out(tmp_path, caplog):
    def made(count):
        return [{"text": f"t{n}", "answers": [f"a{n}"]} for n in range(count)]

    rows = made(8)
    rows[1]["text"], rows[4]["answers"], rows[6]["answers"] = "  ", [], [""]
    files = _data(tmp_path, train=made(20), test=rows)
    record = {"input": "{text}", "target": "{answers[0]}", "choices": None}
    examples = _task(tmp_path, data_files=files, **record).examples("test")
    assert [example.id for example in examples] == [f"toy-test-{row}" for row in (0, 2, 3, 5, 7)]
    assert "3 of 8 rows of test lack an input or a target" in caplog.text


def test_the_limit_counts_complete_rows(tmp_path):
    rows = _rows(40)
    for row in rows[::2]:
        row["word"] = "  "
    files = _data(tmp_path, train=_rows(20), test=rows)
    task = _task(tmp_path, limit=20, data_files=files, target="word", choices=None)
    assert len(task.examples("test")) == 20


def test_a_split_without_any_label_is_refused_with_what_to_do(tmp_path):
    files = _data(tmp_path, train=_rows(20), test=[{"text": "x", "label": -1, "word": "w"}])
    with pytest.raises(GliderError, match=r"no row of the split 'test' .* split_names which split serves as test"):
        _task(tmp_path, data_files=files).examples("test")


def test_a_label_beyond_the_choices_is_reported(tmp_path):
    files = _data(tmp_path, train=_rows(20), test=[{"text": "x", "label": 2, "word": "w"}])
    with pytest.raises(GliderError, match=r"test row 0: the label 2 is not one of the 2 choices"):
        _task(tmp_path, data_files=files).examples("test")


def test_a_data_set_as_the_hub_keeps_it_brings_its_class_names_and_nested_answers(tmp_path):
    import datasets

    features = datasets.Features(
        {
            "question": datasets.Value("string"),
            "answers": {"text": datasets.List(datasets.Value("string"))},
            "kind": datasets.ClassLabel(names=["fact", "number"]),
        }
    )
    rows = [{"question": f"q{n}", "answers": {"text": [f"a{n}", "b"]}, "kind": n % 2} for n in range(20)]
    made = datasets.Dataset.from_list(rows, features=features)
    folder = tmp_path / "repository"
    for split in ("train", "test"):
        (folder / "plain").mkdir(parents=True, exist_ok=True)
        made.to_parquet(folder / "plain" / f"{split}-00000-of-00001.parquet")
    configs = {
        "config_name": "plain",
        "data_files": [{"split": s, "path": f"plain/{s}-*"} for s in ("train", "test")],
    }
    other = {"config_name": "other", "data_files": "plain/test-*"}
    (folder / "README.md").write_text("---\n" + json.dumps({"configs": [configs, other]}) + "\n---\n")
    shared = {"dataset": str(folder), "config": "plain", "input": "{question}", "choices": None}
    kinds = _task(tmp_path, **shared, target="kind").examples("test")
    assert (kinds[1].target, kinds[1].choices) == ("number", ("fact", "number"))
    answers = _task(tmp_path, **shared, target="{answers[text][0]}").examples("test")
    assert (answers[3].input, answers[3].target) == ("q3", "a3")
    with pytest.raises(GliderError, match=r"Config name is missing.*'plain', 'other'"):
        _task(tmp_path, **{**shared, "config": None}, target="kind").examples("test")


def test_a_template_that_does_not_fit_is_reported_with_the_columns(tmp_path):
    task = _task(tmp_path, data_files=_data(tmp_path, train=_rows(20)), input="{sentence}")
    with pytest.raises(GliderError, match=r"'\{sentence\}' does not fit the columns \['label', 'text', 'word'\]"):
        task.examples("train")


def test_a_target_column_of_lists_is_reported(tmp_path):
    rows = [{"text": "x", "answers": ["a", "b"]} for _ in range(20)]
    task = _task(tmp_path, data_files=_data(tmp_path, train=rows), target="answers", choices=None)
    with pytest.raises(GliderError, match="use a column with text or numbers"):
        task.examples("train")


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"dataset": ""}, "dataset is missing"),
        ({"input": None}, "input is missing"),
        ({"target": 3}, "target is missing or not text"),
        ({"split_names": {"dev": "x"}}, "split_names must be an object"),
        ({"split_names": {"test": ["x"]}}, "split_names must name splits"),
        ({"choices": "a"}, "choices must be a list"),
    ],
)
def test_a_malformed_mapping_is_reported_before_any_data_is_fetched(tmp_path, record, message):
    with pytest.raises(GliderError, match=message):
        _task(tmp_path, **record)


def test_a_missing_mapping_is_reported(tmp_path):
    with pytest.raises(GliderError, match=r"nowhere.json does not exist"):
        load_tasks(TasksConfig(source="datasets", path=str(tmp_path / "nowhere.json")), seed=0)


@pytest.mark.parametrize("dataset", ["google/bigbench", "tasksource/big-bench", "someone/bbh"])
def test_a_big_bench_data_set_is_refused_as_held_in(tmp_path, dataset):
    with pytest.raises(GliderError, match="for evaluation only"):
        _task(tmp_path, dataset=dataset)


def test_a_data_set_out_of_reach_is_one_clear_error(tmp_path):
    task = {"name": "toy", "definition": "x", "split": "held_in", "dataset": "no-such-owner/no-such-data-set"}
    (tmp_path / "m.json").write_text(
        json.dumps({"tasks": [{**task, "input": "{a}", "target": "b"}]}), encoding="utf-8"
    )
    script = (
        "from glider_dist.config import TasksConfig\n"
        "from glider_dist.tasks.source import load_tasks\n"
        f"cfg = TasksConfig(source='datasets', path={str(tmp_path / 'm.json')!r})\n"
        "load_tasks(cfg, 0).held_in[0].examples('train')\n"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=root, env=environment
    )
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert "GliderError: the data set 'no-such-owner/no-such-data-set' is neither cached nor within reach" in last


def test_the_data_sets_library_is_not_imported_for_the_other_sources():
    script = "import sys, glider_dist.tasks.source\nassert 'datasets' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True, cwd=Path(__file__).parents[1])
