"""What an imported adapter is said to do: by a file, by its own card, or by its name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from small_jobs import command
from test_pool_import import save_adapter

from glider_dist.errors import GliderError
from glider_dist.pool import ExpertPool
from glider_dist.pool.adapter import CARD_FILE
from glider_dist.semantics.adapter_card import card_description
from glider_dist.semantics.describe import read_descriptions
from glider_dist.testing import random_pool, save_tiny_base, tiny_causal


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save_tiny_base(tmp_path / "base", tiny_causal())


CARDS = {
    "---\nbase_model: x\nlibrary_name: peft\ntags:\n- lora\n- base_model:adapter:x\n---\n# Model Card\n\n"
    "<!-- Provide a quick summary -->\n\n- **Developed by:** [More Information Needed]\n": None,
    "---\ndatasets:\n- org/squad_v2\n---\n# QA\n\nThis model [answers](http://x) **questions** about a text.\n": [
        "This model answers questions about a text.",
        "Fine-tuned on squad_v2.",
    ],
    "---\ntags: [lora, peft, legal-summaries]\n---\n": ["An expert for legal summaries."],
    "---\n: : broken\n  yaml\n---\nIt turns English sentences into SQL queries.\n": [
        "It turns English sentences into SQL queries."
    ],
    "# Environmental Impact\n\nCarbon emissions can be estimated using the [Machine Learning Impact calculator]"
    "(https://mlco2.github.io/impact#compute) presented in [Lacoste et al. (2019)](https://arxiv.org/abs/1910.09700)."
    "\n": None,
    "": None,
}


@pytest.mark.parametrize("text", CARDS)
def test_a_description_is_read_from_the_adapters_own_card(text: str, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(text)
    assert card_description(tmp_path) == (CARDS[text] or [])


def test_experts_are_described_by_file_then_card_then_name(tmp_path: Path, base: Path) -> None:
    for name in ("from_file", "from_card", "only-the_name"):
        save_adapter(tmp_path / "adapters" / name, base)
        (tmp_path / "adapters" / name / "README.md").write_text("# Nothing\n")
    for name in ("from_file", "from_card"):
        (tmp_path / "adapters" / name / "README.md").write_text("It sorts the words of a line by length.\n")
    texts = "# by hand\nfrom_file: Counts things.\nfrom_file: It also counts words.\nnobody: Waits.\n"
    (tmp_path / "texts.txt").write_text(texts)
    pool = tmp_path / "pool"
    assert command("pool", "import", str(pool), str(tmp_path / "adapters")).code == 0
    words = [f"pool={pool}", f"run_dir={tmp_path / 'run'}", "device=cpu", "tracking=off", "tasks.limit=2"]
    outcome = command("describe", *words, f"describe_file={tmp_path / 'texts.txt'}")
    assert outcome.code == 0, outcome.err
    cards = {expert.name: expert.card() for expert in ExpertPool.open(pool).experts()}
    assert cards["from_file"]["descriptions"] == ["Counts things.", "It also counts words."]
    assert cards["from_card"]["descriptions"] == ["It sorts the words of a line by length."]
    assert cards["only-the_name"]["descriptions"] == ["only the name"]
    assert "described by their name alone" in outcome.err
    assert "1 experts that are not in the pool, such as nobody" in outcome.err
    (tmp_path / "texts.txt").write_text("no colon here\n")
    pool_two = random_pool(tmp_path / "two", tiny_causal(), experts=1, base=str(base))
    words[0] = f"pool={pool_two.path}"
    outcome = command("describe", *words, f"describe_file={tmp_path / 'texts.txt'}")
    assert "texts.txt line 1" in outcome.errors[0]


def test_a_file_of_descriptions_is_utf8_with_or_without_a_mark_and_another_is_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "texts.txt"
    path.write_bytes("\ufeffmenus: Übersetzt Menüs.\n".encode())
    assert read_descriptions(path) == {"menus": ["Übersetzt Menüs."]}
    path.write_bytes("menus: Übersetzt.\n".encode("latin-1"))
    with pytest.raises(GliderError, match=r"texts.txt is not UTF-8 text \(byte 7\); convert it$"):
        read_descriptions(path)


def test_a_card_that_came_with_an_exported_expert_is_kept(tmp_path: Path, base: Path) -> None:
    pool = random_pool(tmp_path / "first", tiny_causal(), experts=["x"], base=str(base))
    pool.expert("x").update_card(descriptions=["It does x."], scores={"validation_loss": 1.25})
    command("pool", "export", str(pool.path), str(tmp_path / "out"))
    command("pool", "import", str(tmp_path / "second"), str(tmp_path / "out"), f"base={base}")
    card = json.loads((tmp_path / "second" / "experts" / "x" / CARD_FILE).read_text())
    assert card["descriptions"] == ["It does x."]
    assert card["scores"] == {"validation_loss": 1.25}


def test_a_file_takes_the_place_of_a_card_and_a_template_is_no_description(tmp_path: Path) -> None:
    pool = random_pool(tmp_path / "pool", tiny_causal(), experts=["a", "b", "c", "d"])
    stock = "Carbon emissions can be estimated using the Machine Learning Impact calculator."
    for name, text, source in (
        ("a", "From its card.", "adapter card"), ("b", "From its card.", "adapter card"),
        ("c", stock, "adapter card"), ("d", "By hand.", None),
    ):  # fmt: skip
        pool.expert(name).update_card(descriptions=[text], description_source=source, readme=[text])
    (tmp_path / "texts.txt").write_text("a: It counts.\nd: It is not asked.\n")
    words = [f"pool={pool.path}", f"run_dir={tmp_path / 'run'}", "device=cpu", "tracking=off", "tasks.limit=2"]
    outcome = command("describe", *words, f"describe_file={tmp_path / 'texts.txt'}")
    assert outcome.code == 0, outcome.err
    assert {expert.name: expert.card()["descriptions"] for expert in pool.experts()} == {
        "a": ["It counts."], "b": ["From its card."], "c": ["c"], "d": ["By hand."],
    }  # fmt: skip
