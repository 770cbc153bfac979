"""Bad input ends in one sentence that says what is wrong and where, exit code 2, and nothing written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_jobs import (
    HELD_IN,
    Outcome,
    command,
    describe_and_index,
    settings,
    snapshot,
    write_tasks,
)

from glider_dist.errors import GliderError
from glider_dist.model.sites import fingerprint
from glider_dist.pool import ExpertPool
from glider_dist.pool.adapter import CONFIG_FILE, GATE_FILE, WEIGHTS_FILE, write_adapter
from glider_dist.semantics.index import FILE
from glider_dist.testing import random_pool, tiny_causal

ROUTED = ("train-gates", "evaluate", "predict")
SITE = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with a folder of tasks: what a command writes by default lands in it, too."""
    monkeypatch.chdir(tmp_path)
    write_tasks(tmp_path / "tasks")
    return tmp_path


@pytest.fixture
def pool(folder: Path) -> ExpertPool:
    """Three experts with gates, descriptions and an index."""
    made = random_pool(folder / "pool", tiny_causal(), experts=HELD_IN)
    describe_and_index(made)
    return made


Refused = Callable[..., str]


@pytest.fixture
def refused(folder: Path, base: Path) -> Refused:
    """Run a command and return its one sentence, having checked that it wrote nothing and left code 2."""

    def run(name: str, *words: str, text: str | None = None, **changes: Any) -> str:
        before = snapshot(folder)
        if name == "predict" and text is None:
            text = "Repeat the words. Input: sun river"
        texts = [] if text is None else [text]
        outcome = command(name, *texts, *settings(folder, **{"base": base, **changes}), *words)
        assert snapshot(folder) == before
        return one_sentence(outcome)

    return run


def one_sentence(outcome: Outcome) -> str:
    assert outcome.code == 2, outcome
    assert len(outcome.errors) == 1, outcome.err
    assert "Traceback" not in outcome.err
    assert outcome.err.rstrip().splitlines()[-1].endswith(outcome.errors[0])
    return outcome.errors[0]


def says(message: str, *needles: object) -> None:
    missing = [str(needle) for needle in needles if str(needle) not in message]
    assert not missing, f"{message!r} does not name {missing}"


# --- the command line -------------------------------------------------------------------------------------


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
        (["evaluate", "--fresh"], ["--fresh", "quickstart"]),
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


# --- tasks ------------------------------------------------------------------------------------------------


def test_a_missing_tasks_folder_is_named(refused: Refused, folder: Path) -> None:
    says(refused("train-experts", f"tasks.path={folder}/gone"), "tasks.path", f"{folder}/gone")


def test_a_folder_without_tasks_is_named(refused: Refused, folder: Path) -> None:
    (folder / "tasks" / "tasks.json").unlink()
    says(refused("train-experts"), folder / "tasks", "tasks.json")


def test_an_unknown_task_is_refused_with_the_nearest_name(refused: Refused) -> None:
    says(refused("train-experts", "tasks.held_in=[uper]"), "'uper'", "'upper'")


@pytest.mark.parametrize("part", ["train", "validation"])
def test_a_missing_split_is_named_with_its_file(part: str, refused: Refused, folder: Path) -> None:
    path = folder / "tasks" / "tasks" / "upper" / f"{part}.jsonl"
    path.unlink()
    says(refused("train-experts"), "'upper'", part, path)


def test_a_missing_test_split_is_named_with_its_file(refused: Refused, folder: Path, pool: ExpertPool) -> None:
    path = folder / "tasks" / "tasks" / "first" / "test.jsonl"
    path.unlink()
    says(refused("evaluate"), "'first'", "test", path)


def test_a_malformed_line_is_named_with_file_and_number(refused: Refused, folder: Path) -> None:
    path = folder / "tasks" / "tasks" / "last" / "train.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:4], lines[4][:-5], *lines[5:]]))
    says(refused("train-experts"), path, "line 5", "not JSON")


def test_an_empty_task_is_named_with_its_file(refused: Refused, folder: Path) -> None:
    path = folder / "tasks" / "tasks" / "copy" / "train.jsonl"
    path.write_text("\n \n")
    says(refused("train-experts"), path, "empty", "'copy'")


@pytest.mark.parametrize(
    ("stage", "part"), [("train-experts", "train"), ("train-gates", "train"), ("evaluate", "test")]
)
def test_a_target_longer_than_the_limit_is_named_with_its_task_and_length(
    stage: str, part: str, refused: Refused, folder: Path, request: pytest.FixtureRequest
) -> None:
    if stage != "train-experts":
        random_pool(folder / "pool", tiny_causal(), experts=HELD_IN, gates=stage == "evaluate")
    path = folder / "tasks" / "tasks" / "upper" / f"{part}.jsonl"
    path.write_text(path.read_text() + json.dumps({"id": "long", "input": "sun", "target": "SUN" * 70}) + "\n")
    message = refused(stage, tasks__max_length=200, evaluate__queries=5, evaluate__routers="[base]")
    says(message, "'upper'", part, "212 tokens", "tasks.max_length is 200")


@pytest.mark.parametrize("name", ["../evil", "a/b", "a\\\\b", ".hidden", ""])
def test_a_task_whose_name_cannot_name_a_folder_is_refused(name: str, refused: Refused, folder: Path) -> None:
    path = folder / "tasks" / "tasks.json"
    path.write_text(path.read_text().replace('"copy"', f'"{name}"'))
    says(refused("train-experts"), "name", repr(json.loads(f'"{name}"')))


def test_a_task_whose_name_the_pool_cannot_take_is_refused_before_training(refused: Refused, folder: Path) -> None:
    path = folder / "tasks" / "tasks.json"
    path.write_text(path.read_text().replace('"copy"', '"copy all"'))
    (folder / "tasks" / "tasks" / "copy").rename(folder / "tasks" / "tasks" / "copy all")
    says(refused("train-experts"), "'copy all'")


def test_two_tasks_of_one_name_are_refused(refused: Refused, folder: Path) -> None:
    path = folder / "tasks" / "tasks.json"
    path.write_text(path.read_text().replace('"copy"', '"upper"'))
    says(refused("train-experts"), "two tasks", "'upper'")


# --- pool and base ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["train-experts", "train-gates", "calibrate", "evaluate", "predict"])
@pytest.mark.parametrize("other", ["shapes", "weights"])
def test_a_pool_made_for_another_base_is_refused(
    stage: str, other: str, refused: Refused, folder: Path, base: Path
) -> None:
    missing = stage.startswith("train")
    model = tiny_causal(hidden_size=32) if other == "shapes" else tiny_causal()
    names = HELD_IN[:2] if stage == "train-experts" else HELD_IN
    pool = random_pool(folder / "pool", model, experts=names, gates=not missing)
    describe_and_index(pool)
    if other == "weights":
        value = json.loads((pool.path / "pool.json").read_text())
        value["fingerprint"]["weights_sha256"] = "0" * 64
        (pool.path / "pool.json").write_text(json.dumps(value))
    difference = "site model.layers.0" if other == "shapes" else "weights 000000000000"
    says(refused(stage), pool.path, "another base", difference)


def test_a_base_that_is_not_there_and_no_network_are_one_sentence(
    refused: Refused, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    says(refused("train-experts", base="nobody/nothing"), "no network and no cached copy", "'nobody/nothing'")
    says(refused("train-experts", base=folder / "gone"), folder / "gone")
    says(refused("train-experts", base=folder / "tasks"), folder / "tasks", "config.json")


@pytest.mark.parametrize("stage", ["train-gates", "describe", "index", "calibrate", "evaluate", "predict"])
def test_a_folder_without_a_pool_is_refused(stage: str, refused: Refused, folder: Path) -> None:
    says(refused(stage), folder / "pool", "no pool.json")


@pytest.mark.parametrize("stage", ["index", "evaluate", "predict", "train-gates", "calibrate"])
def test_an_empty_pool_is_refused(stage: str, refused: Refused, folder: Path) -> None:
    ExpertPool.create(folder / "pool", "tiny", fingerprint(tiny_causal()))
    says(refused(stage, evaluate__routers="[base]", router__kind="base"), "pool")


def test_target_layers_that_the_model_lacks_are_refused(refused: Refused) -> None:
    says(refused("train-experts", "lora.targets=[q_proj,c_attn]"), "lora.targets", "'c_attn'", "down_proj")


def replace_adapter(pool: ExpertPool, name: str, site: str, d_in: int, d_out: int) -> None:
    """Put an adapter into the pool by hand, past the checks of ``add``."""
    folder = pool.path / "experts" / name
    write_adapter(folder, {site: (torch.ones(2, d_in), torch.ones(d_out, 2))}, 4.0, [site], "tiny", "CAUSAL_LM")
    save_file({site: torch.ones(d_in)}, folder / GATE_FILE)


@pytest.mark.parametrize("stage", ROUTED)
@pytest.mark.parametrize(
    ("site", "d_in", "needles"),
    [
        ("model.layers.7.self_attn.q_proj", 48, ["'upper'", "model.layers.7.self_attn.q_proj", "base"]),
        ("lm_head", 48, ["'upper'", "lm_head"]),
        (SITE, 40, ["'upper'", SITE, "(48, 40)", "(48, 48)"]),
    ],
)
def test_an_adapter_that_does_not_fit_the_base_is_refused(
    stage: str, site: str, d_in: int, needles: list[str], refused: Refused, folder: Path
) -> None:
    pool = random_pool(folder / "pool", tiny_causal(), experts=HELD_IN)
    replace_adapter(pool, "upper", site, d_in, 48)
    describe_and_index(pool)
    if stage == "train-gates":
        # The first expert's gate would be trained and written before the second one is looked at.
        for name in ("copy", "upper"):
            (pool.path / "experts" / name / GATE_FILE).unlink()
    says(refused(stage), *needles)


@pytest.mark.parametrize(
    ("site", "d_in", "needles"),
    [
        ("model.layers.7.self_attn.q_proj", 48, ["model.layers.7.self_attn.q_proj", "not a linear layer"]),
        (SITE, 40, [SITE, "(48, 40)", "(48, 48)"]),
    ],
)
def test_adding_an_adapter_that_does_not_fit_leaves_the_pool_as_it_was(
    site: str, d_in: int, needles: list[str], folder: Path
) -> None:
    pool = random_pool(folder / "pool", tiny_causal(), experts=["copy"])
    replace_adapter(pool, "adapter", site, d_in, 48)
    adapter = shutil.move(pool.path / "experts" / "adapter", folder / "adapter")
    before = snapshot(pool.path)
    with pytest.raises(GliderError) as error:
        pool.add("upper", adapter)
    says(str(error.value), "'upper'", *needles)
    assert snapshot(pool.path) == before


@pytest.mark.parametrize("name", ["copy", "../copy", "a/b", "a\\b", "", ".", "..", ".hidden", "-flag", "x" * 201])
def test_a_name_that_is_taken_or_not_allowed_is_refused_and_the_pool_left_as_it_was(
    name: str, folder: Path
) -> None:
    pool = random_pool(folder / "pool", tiny_causal(), experts=["copy"])
    before = snapshot(folder)
    with pytest.raises(GliderError) as error:
        pool.add(name, pool.path / "experts" / "copy")
    says(str(error.value), "already has" if name == "copy" else "not allowed", repr(name))
    assert snapshot(folder) == before


REFUSED_ADAPTERS = [
    ({"use_dora": True}, "DoRA"),
    ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    ({"bias": "all"}, "biases"),
    ({"bias": "lora_only"}, "biases"),
    ({"lora_bias": True}, "biases"),
    ({"trainable_token_indices": [1, 2]}, "trainable_token_indices"),
    ({"layer_replication": [[0, 1]]}, "layer_replication"),
    ({"target_parameters": ["mlp.experts"]}, "target_parameters"),
    ({"alora_invocation_tokens": [5]}, "alora_invocation_tokens"),
    ({"init_lora_weights": "pissa_niter_4"}, "pissa"),
    ({"peft_type": "IA3"}, "IA3"),
    ({"peft_type": None}, "peft_type"),
]


@pytest.mark.parametrize(("change", "needle"), REFUSED_ADAPTERS, ids=str)
def test_an_adapter_that_cannot_be_routed_is_refused_with_the_reason(
    change: dict[str, Any], needle: str, refused: Refused, folder: Path, pool: ExpertPool
) -> None:
    adapter = pool.path / "experts" / "upper"
    config = json.loads((adapter / CONFIG_FILE).read_text())
    (adapter / CONFIG_FILE).write_text(json.dumps({**config, **change}))
    before = snapshot(pool.path)
    with pytest.raises(GliderError) as error:
        pool.add("again", adapter)
    says(str(error.value), adapter / CONFIG_FILE, needle)
    assert snapshot(pool.path) == before
    says(refused("predict"), adapter / CONFIG_FILE, needle)


@pytest.mark.parametrize("stage", ["evaluate", "predict"])
@pytest.mark.parametrize("damage", ["cut", "text", "empty", "gone", "half a pair", "another tensor"])
def test_a_broken_adapter_file_is_named(damage: str, stage: str, refused: Refused, pool: ExpertPool) -> None:
    path = pool.path / "experts" / "upper" / WEIGHTS_FILE
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-100])
    elif damage in ("text", "empty"):
        path.write_bytes(b"<html>not found</html>" if damage == "text" else b"")
    elif damage == "gone":
        path.unlink()
    else:
        tensors = load_file(path)
        key = next(iter(tensors))
        moved = tensors.pop(key)
        if damage == "another tensor":
            tensors["base_model.model.lm_head.weight"] = moved
        save_file(tensors, path)
    # A task without its expert is one mistake, a file that is damaged another.
    says(refused(stage), "'upper'" if damage == "gone" and stage == "evaluate" else path)


def test_training_a_gate_for_a_broken_adapter_is_refused_before_any_gate_is_trained(
    refused: Refused, folder: Path
) -> None:
    pool = random_pool(folder / "pool", tiny_causal(), experts=HELD_IN, gates=False)
    path = pool.path / "experts" / "upper" / WEIGHTS_FILE
    path.write_bytes(path.read_bytes()[:-100])
    says(refused("train-gates"), path)


@pytest.mark.parametrize("damage", ["cut", "wrong length", "a site less"])
def test_a_broken_gate_is_named(damage: str, refused: Refused, pool: ExpertPool) -> None:
    path = pool.path / "experts" / "last" / GATE_FILE
    tensors = load_file(path)
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:50])
    elif damage == "wrong length":
        save_file({**tensors, SITE: torch.ones(7)}, path)
    else:
        save_file({key: value for key, value in tensors.items() if key != SITE}, path)
    says(refused("predict"), path if damage == "cut" else f"'last' {'at' if 'wrong' in damage else 'lacks'}")


@pytest.mark.parametrize("stage", ["evaluate", "predict", "calibrate"])
def test_a_missing_gate_is_refused_where_gates_are_needed(stage: str, refused: Refused, pool: ExpertPool) -> None:
    (pool.path / "experts" / "last" / GATE_FILE).unlink()
    says(refused(stage, router__kind="phatgoose"), "'last' has no gate", "1 of 3", "train-gates")


@pytest.mark.parametrize("stage", ["evaluate", "predict", "calibrate"])
def test_more_experts_per_token_than_the_pool_has_are_refused(
    stage: str, refused: Refused, pool: ExpertPool
) -> None:
    says(refused(stage, "router.top_k=4"), "router.top_k=4", "3 experts")


def test_an_unknown_router_is_refused_with_the_ones_there_are(refused: Refused, pool: ExpertPool) -> None:
    says(refused("predict", "router.kind=magic"), "router.kind", "'magic'", "phatgoose")
    says(refused("evaluate", "evaluate.routers=[base,magic]"), "'magic'", "phatgoose")
    says(refused("evaluate", "evaluate.routers=[base,base]"), "evaluate.routers", "twice")
    says(refused("evaluate", "evaluate.routers=[]"), "evaluate.routers")


@pytest.mark.parametrize("stage", ["train-experts", "describe", "index", "calibrate", "evaluate"])
def test_a_run_directory_that_cannot_be_made_is_refused_before_anything_is_done(
    stage: str, refused: Refused, folder: Path, pool: ExpertPool
) -> None:
    says(refused(stage, run_dir=folder / "tasks" / "tasks.json" / "run"), "run_dir", "no folder")
    says(refused(stage, run_dir=folder / "tasks" / "tasks.json"), "run_dir", "no folder")


def test_the_oracle_cannot_answer_a_typed_text(refused: Refused, pool: ExpertPool) -> None:
    says(refused("predict", "router.kind=oracle"), "oracle", "task")


@pytest.mark.parametrize("text", ["", "   "])
def test_there_must_be_a_text_to_answer(text: str, refused: Refused, pool: ExpertPool) -> None:
    says(refused("predict", text=text), "no text")


def test_a_choice_longer_than_the_limit_is_named_before_anything_is_answered(
    refused: Refused, folder: Path, pool: ExpertPool
) -> None:
    path = folder / "tasks" / "tasks" / "copy" / "test.jsonl"
    path.write_text(json.dumps({"id": "x", "input": "i", "target": "a", "choices": ["a", "b" * 300]}) + "\n")
    message = refused("evaluate", "evaluate.rank_classification=true", "evaluate.routers=[base]")
    says(message, "'copy'", "choices of example 'x'", "302 tokens")


def test_half_a_surrogate_pair_is_refused(refused: Refused, folder: Path, pool: ExpertPool) -> None:
    says(refused("predict", text="Repeat. Input: \udcff"), "the text to answer", "surrogate")
    path = folder / "tasks" / "tasks" / "copy" / "test.jsonl"
    path.write_text('{"id": "x", "input": "\\ud800", "target": "x"}\n')
    says(refused("evaluate"), path, "line 1", "input", "surrogate")


def test_evaluating_a_task_that_has_no_expert_yet_is_refused(refused: Refused, folder: Path) -> None:
    random_pool(folder / "pool", tiny_causal(), experts=HELD_IN[:2])
    says(refused("evaluate", "evaluate.routers=[base]"), "'last'", "train-experts")


def test_calibrating_on_a_single_expert_is_refused(refused: Refused, folder: Path) -> None:
    describe_and_index(random_pool(folder / "pool", tiny_causal(), experts=HELD_IN[:1]))
    says(refused("calibrate", router__top_k=1), "at least two experts")


DAMAGES = [b"[]", b"null", b"{", b"\xff\xfe"]


@pytest.mark.parametrize("damage", DAMAGES, ids=str)
@pytest.mark.parametrize("file", ["pool.json", "experts/upper/card.json", "router/calibration.json"])
def test_a_damaged_file_of_the_pool_is_named(
    file: str, damage: bytes, refused: Refused, folder: Path, pool: ExpertPool
) -> None:
    (pool.path / file).write_bytes(damage)
    says(refused("evaluate"), pool.path / file)


def test_a_pool_without_its_base_or_with_odd_shapes_is_refused(refused: Refused, pool: ExpertPool) -> None:
    path = pool.path / "pool.json"
    value = json.loads(path.read_text())
    for change in ({"fingerprint": {"sites": {"q_proj": 3}}}, {"fingerprint": []}):
        path.write_text(json.dumps({**value, **change}))
        says(refused("evaluate"), path)
    path.write_text(json.dumps({"format": value["format"]}))
    says(refused("evaluate"), path, "base")


def test_a_calibration_without_numbers_is_refused(refused: Refused, pool: ExpertPool) -> None:
    path = pool.router_dir / "calibration.json"
    path.write_text(json.dumps({"alpha_in": "a lot"}))
    says(refused("predict"), "calibration.json", "alpha_in='a lot'", "run calibrate")


@pytest.mark.parametrize("descriptions", ["text", [1], [" "]])
def test_descriptions_that_are_no_sentences_are_refused(
    descriptions: Any, refused: Refused, pool: ExpertPool
) -> None:
    pool.expert("upper").update_card(descriptions=descriptions)
    for stage in ("index", "evaluate"):
        says(refused(stage), "upper/card.json", "no list of sentences")


@pytest.mark.parametrize("key", ["calibrate.alphas=[.nan]", "calibrate.alphas=[.inf]", "router.threshold=.nan"])
def test_settings_that_are_no_finite_numbers_are_refused(key: str, refused: Refused, pool: ExpertPool) -> None:
    says(refused("calibrate", key), key.split("=")[0], "finite")


# --- the index --------------------------------------------------------------------------------------------

INDEXED = ("calibrate", "evaluate", "predict")


@pytest.mark.parametrize("stage", INDEXED)
def test_a_missing_index_is_named(stage: str, refused: Refused, pool: ExpertPool) -> None:
    (pool.router_dir / FILE).unlink()
    says(refused(stage), pool.router_dir / FILE, "run index")


@pytest.mark.parametrize("stage", INDEXED)
def test_an_index_older_than_an_experts_description_is_refused(
    stage: str, refused: Refused, pool: ExpertPool
) -> None:
    pool.expert("upper").update_card(descriptions=["Something else now."])
    says(refused(stage), pool.router_dir / FILE, "changed", "run index again")


@pytest.mark.parametrize("stage", INDEXED)
def test_an_index_older_than_an_expert_is_refused(
    stage: str, refused: Refused, folder: Path, pool: ExpertPool
) -> None:
    expert = pool.expert("upper")
    pool.add("new", expert.folder, gate=expert.folder / GATE_FILE)
    says(refused(stage), pool.router_dir / FILE, "new", "run index again")


@pytest.mark.parametrize("stage", INDEXED)
def test_an_index_of_another_embedder_is_refused(stage: str, refused: Refused, pool: ExpertPool) -> None:
    describe_and_index(pool, embedder="some/other-embedder")
    says(refused(stage), "'some/other-embedder'", "'all-minilm-l6-v2'")


def test_an_index_of_another_dimension_than_the_embedders_is_refused(refused: Refused, pool: ExpertPool) -> None:
    describe_and_index(pool, width=8)
    says(refused("predict"), "384 dimensions", "index 8")


@pytest.mark.parametrize("stage", INDEXED)
def test_a_broken_index_is_named(stage: str, refused: Refused, pool: ExpertPool) -> None:
    path = pool.router_dir / FILE
    path.write_bytes(path.read_bytes()[:-10])
    says(refused(stage), path, "run index again")


def test_an_index_needs_descriptions(refused: Refused, folder: Path) -> None:
    random_pool(folder / "pool", tiny_causal(), experts=HELD_IN)
    says(refused("index"), "'copy' has no description", "describe")


def test_a_file_of_descriptions_with_a_line_that_is_none_is_refused(refused: Refused, folder: Path) -> None:
    random_pool(folder / "pool", tiny_causal(), experts=[*HELD_IN, "foreign"])
    (folder / "descriptions.txt").write_text("foreign: Does what no other expert does.\nno colon here\n")
    says(refused("describe", f"describe_file={folder}/descriptions.txt"), "descriptions.txt line 2")


def test_an_embedder_that_is_not_there_is_one_sentence(refused: Refused, folder: Path) -> None:
    pool = random_pool(folder / "pool", tiny_causal(), experts=HELD_IN)
    for expert in pool.experts():
        expert.update_card(descriptions=["A description."])
    says(refused("index", f"embedder={folder}/gone"), f"{folder}/gone", "embedder=")
