"""What an adapter's own model card, its README.md, says about it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

README = "README.md"
_LONGEST = 300  # characters of prose kept; an embedder reads no more than a few sentences well
_READ = 200_000  # characters of the file looked at
# Sentences that tools write into every card.
_BOILERPLATE = (
    "more information needed",
    "provide a quick summary",
    "provide a longer summary",
    "this modelcard aims to be a base template",
    "this model card has been",
    "this model was trained with",
    "has been automatically generated",
    "has been generated automatically",
    "you should probably proofread",
    "use the code below",
    "the following hyperparameters",
    "the following `bitsandbytes`",
    "users (both direct and downstream)",
    "training procedure",
    "carbon emissions can be estimated",
)
# Tags that name the tools and not the task.
_TOOL_TAGS = re.compile(
    r"(?i)(?:peft|lora|qlora|adapter|transformers|safetensors|pytorch|trl|sft|unsloth|axolotl|generated_from_trainer|"
    r"text-generation|text-generation-inference|endpoints_compatible|llama-factory|autotrain|hf_jobs|"
    r"[\w\-]+:.*|arxiv.*)"
)


def is_boilerplate(text: str) -> bool:
    """Whether it is of a template, and says nothing of the adapter."""
    lower = text.lower()
    return any(part in lower for part in _BOILERPLATE)


def card_description(folder: Path) -> list[str]:
    """Descriptions from the README.md in ``folder``, none if it says nothing.

    The first paragraph of prose that is not a template's, cut to whole sentences, and one sentence that names the
    data sets in the front matter. Tags other than those of tools stand in where both are missing.
    """
    try:
        text = (folder / README).read_text(encoding="utf-8", errors="replace")[:_READ]
    except OSError:
        return []
    front, body = _split(text)
    found = []
    if prose := _first_prose(body):
        found.append(prose)
    if datasets := _words(front.get("datasets")):
        found.append(f"Fine-tuned on {' and '.join(datasets)}.")
    if not found:
        tags = [tag for tag in _words(front.get("tags")) if not _TOOL_TAGS.fullmatch(tag)]
        if tags:
            found.append(f"An expert for {', '.join(tag.replace('-', ' ') for tag in tags)}.")
    return found


def _split(text: str) -> tuple[dict[str, Any], str]:
    match = re.match(r"\s*---\s*\n(.*?)\n---\s*(?:\n|$)", text, re.DOTALL)
    if not match:
        return {}, text
    try:
        front = yaml.safe_load(match[1])
    except yaml.YAMLError:
        front = None
    return front if isinstance(front, dict) else {}, text[match.end() :]


def _words(value: Any) -> list[str]:
    items = value if isinstance(value, list) else [value]
    names = [str(item.get("name", "")) if isinstance(item, dict) else str(item) for item in items if item]
    return [name.rsplit("/", 1)[-1] for name in names if name.strip()]


def _first_prose(body: str) -> str:
    body = re.sub(r"<!--.*?-->", "", body, flags=re.DOTALL)
    body = re.sub(r"(?ms)^\s*```.*?^\s*```\s*$", "", body)
    for block in re.split(r"\n\s*\n", body):
        lines = [line.strip() for line in block.splitlines()]
        # Headings, tables, lists, images and badges are no prose.
        kept = [
            line
            for line in lines
            if line and not re.match(r"(?:#|\||[-*+]\s|\d+\.\s|!\[|\[!\[|<|>|=+$|-+$)", line)
        ]
        prose = _plain(" ".join(kept))
        if len(prose.split()) >= 4 and not is_boilerplate(prose):
            return _shortened(prose)
    return ""


def _plain(text: str) -> str:
    text = re.sub(r"!\[[^\]]*\]\([^)]*\)", "", text)
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text)
    text = re.sub(r"<[^>]+>", "", text)
    return " ".join(re.sub(r"[*`]+|(?<!\w)_+|_+(?!\w)", "", text).split())


def _shortened(text: str) -> str:
    kept = ""
    for sentence in re.split(r"(?<=[.!?])\s+", text):
        if kept and len(kept) + len(sentence) > _LONGEST:
            break
        kept = f"{kept} {sentence}".strip()
    return kept if len(kept) <= _LONGEST else kept[:_LONGEST].rsplit(" ", 1)[0] + "..."
