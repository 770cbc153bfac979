"""The stage ``describe``: one or several sentences about what each expert does, written into its card."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glider_dist.errors import GliderError
from glider_dist.pool import ExpertPool
from glider_dist.pool.adapter import CARD_FILE
from glider_dist.pool.files import read_text
from glider_dist.semantics.adapter_card import is_boilerplate

if TYPE_CHECKING:
    from glider_dist.job import Job
    from glider_dist.tasks.task import Task

log = logging.getLogger(__name__)
_OF_TASK = ("task descriptions", "task definition")
_BY_NAME, _BY_CARD, _BY_FILE = "name", "adapter card", "file"


def descriptions_of(pool: ExpertPool) -> dict[str, list[str]]:
    """``{expert: descriptions}`` from the cards, in the pool's order.

    Raises:
        GliderError: if a card has something else there than sentences.
    """
    found = {}
    for expert in pool.experts():
        texts = expert.card().get("descriptions") or []
        if not isinstance(texts, list) or not all(isinstance(text, str) and text.strip() for text in texts):
            raise GliderError(
                f"the descriptions in {expert.folder / CARD_FILE} are no list of sentences; write some, or [] and "
                "run describe"
            )
        found[expert.name] = texts
    return found


def describe_task(task: Task) -> tuple[list[str], str]:
    """The task's own descriptions, else its definition; and which of the two it was.

    Raises:
        GliderError: if it has neither.
    """
    if task.descriptions:
        return list(task.descriptions), _OF_TASK[0]
    if task.definition.strip():
        return [task.definition], _OF_TASK[1]
    raise GliderError(f"task {task.name!r} has neither descriptions nor a definition; add one to tasks.json")


def read_descriptions(path: Path) -> dict[str, list[str]]:
    """``{expert: descriptions}`` from a text file of lines ``EXPERT: DESCRIPTION``.

    An expert may have several lines. Empty lines and lines that start with ``#`` do not count.

    Raises:
        GliderError: the file is missing or not UTF-8, or a line has no colon, no name or no text.
    """
    found: dict[str, list[str]] = {}
    for number, line in enumerate(read_text(path, "convert it").splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        name, _, text = (part.strip() for part in line.partition(":"))
        if not name or not text:
            raise GliderError(f"{path} line {number} is not EXPERT: DESCRIPTION")
        found.setdefault(name, []).append(text)
    return found


def name_in_words(name: str) -> str:
    """An expert's name as words: ``squad_v2-gen`` becomes ``squad v2 gen``."""
    return " ".join(re.split(r"[_.\-\s]+", name)).strip()


def run(job: Job) -> None:
    """Describe every expert that has no description yet or only its name, and say in its card by what.

    By a chat model from training examples, where ``describe.source=llm`` and the job has the expert's task; it
    also replaces what was taken from the task's own texts before. Else from the task; else from
    ``describe_file``; else from the adapter's own card, noted at import; else from the name, with a warning.
    ``describe_file`` also takes the place of what came from an adapter's card or from an earlier file.
    Descriptions that somebody wrote into a card stay.

    Raises:
        GliderError: an expert's task has no text, ``describe_file`` cannot be read, or the chat endpoint refuses.
    """
    pool = job.open_pool(check_base=False)
    by_name = {task.name: task for task in job.tasks.all}
    from_file = read_descriptions(Path(job.cfg.describe_file)) if job.cfg.describe_file else {}
    cards = {expert.name: expert.card() for expert in pool.experts()}
    by_chat = []
    if job.cfg.describe.source == "llm":
        by_chat = [
            by_name[name] for name, card in cards.items() if name in by_name and _lacks(name, card, *_OF_TASK)
        ]
    job.ranks.on_main(lambda: _by_chat(job, pool, by_chat))
    job.stop.agree(bool(by_chat) and job.stop.wished)
    todo = []
    for expert in pool.experts():
        replaceable = (_BY_CARD, _BY_FILE) if expert.name in from_file else ()
        if _lacks(expert.name, expert.card(), *replaceable):
            todo.append(expert.name)
    texts: dict[str, tuple[list[str], str]] = {}
    for name in todo:
        if name in by_name:
            texts[name] = describe_task(by_name[name])
        elif name in from_file:
            texts[name] = (from_file[name], _BY_FILE)
        elif readme := [text for text in cards[name].get("readme") or [] if not is_boilerplate(text)]:
            texts[name] = (readme, _BY_CARD)
        else:
            texts[name] = ([name_in_words(name)], _BY_NAME)
    texts = {name: found for name, found in texts.items() if cards[name].get("descriptions") != found[0]}
    # All ranks have read the cards before the first is written.
    job.ranks.barrier()
    if job.ranks.is_main:
        for name, (sentences, source) in texts.items():
            pool.expert(name).update_card(descriptions=sentences, description_source=source)
        if unknown := [name for name in from_file if name not in pool]:
            log.warning(
                "describe_file= describes %d experts that are not in the pool, such as %s",
                len(unknown),
                unknown[0],
            )
        by_name_alone = [name for name, (_, source) in texts.items() if source == _BY_NAME]
        if by_name_alone:
            log.warning(
                "%d experts are described by their name alone, such as %s; describe_file= says more of them",
                len(by_name_alone),
                by_name_alone[0],
            )
        job.run.log({"describe/experts": len(texts)})
        log.info("described %d of %d experts by their tasks, files, cards or names", len(texts), len(pool))
    job.ranks.barrier()


def _lacks(name: str, card: dict[str, Any], *improvable: str) -> bool:
    """Whether an expert has no descriptions, or none but its name, a template's or of such a source."""
    texts, source = card.get("descriptions"), card.get("description_source")
    named = source == _BY_NAME and texts == [name_in_words(name)]
    stock = source == _BY_CARD and any(map(is_boilerplate, texts or ()))
    return not texts or named or stock or source in improvable


def _by_chat(job: Job, pool: ExpertPool, tasks: list[Task]) -> None:
    if not tasks:
        return
    from glider_dist.semantics.chat import ChatModel
    from glider_dist.semantics.chat_descriptions import describe_experts

    chat = ChatModel(job.cfg.describe)

    def done(task: Task, sentences: list[str], record: dict[str, Any]) -> None:
        pool.expert(task.name).update_card(
            descriptions=sentences, description_source="llm", description_record=record
        )

    try:
        failed = describe_experts(tasks, chat, job.cfg.describe, job.cfg.seed, done, lambda: job.stop.wished)
    finally:
        usage = chat.usage
        log.info("%s: %s", chat.model, usage)
        job.run.log({f"describe/{key}": value for key, value in vars(usage).items()})
        chat.close()
    if failed:
        name, reason = next(iter(failed.items()))
        log.warning("%d experts keep the texts of their tasks, such as %s: %s", len(failed), name, reason)
