"""Bringing adapters into a pool: all are checked by their headers first, and written only if none is refused."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from glider_dist.errors import GliderError
from glider_dist.pool.adapter import AdapterInfo
from glider_dist.pool.fingerprint import check_gate, check_sites
from glider_dist.pool.names import check_name
from glider_dist.pool.sources import Source
from glider_dist.pool.store import ExpertPool
from glider_dist.text_table import megabytes, span, table
from glider_dist.tracking.progress import progress

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Verdict:
    """What becomes of one adapter: ``new``, ``there`` (the pool has exactly these files) or ``refused``."""

    source: Source
    kind: Literal["new", "there", "refused"]
    reason: str = ""
    info: AdapterInfo | None = None
    gate: bool = False


def check(
    sources: Sequence[Source], pool: ExpertPool | None, known: Mapping[str, tuple[int, int]]
) -> list[Verdict]:
    """Judge every adapter without writing anything.

    Args:
        pool: the pool they are meant for, None if there is none yet.
        known: ``{site: (d_out, d_in)}`` of the base; empty if unknown, and then nothing is compared with it.
    """
    counts = Counter(source.name for source in sources)
    found = []
    for source in progress(sources, desc="checking", enabled=len(sources) > 20):
        try:
            if counts[source.name] > 1:
                raise GliderError(
                    f"{counts[source.name]} adapters have this name; write NAME=PATH to tell them apart, "
                    f"this one as NAME={source.origin}"
                )
            found.append(_judge(source, pool, known))
        except GliderError as error:
            found.append(Verdict(source, "refused", str(error)))
    return found


def _judge(source: Source, pool: ExpertPool | None, known: Mapping[str, tuple[int, int]]) -> Verdict:
    try:
        check_name(source.name)
    except GliderError as error:
        raise GliderError(f"{error}; or choose a name, as NAME={source.origin}") from None
    info = source.info
    check_sites(source.name, info.shapes, dict(known))
    gate = source.gate()
    if gate is not None:
        check_gate(source.name, gate, info.shapes)
    kind: Literal["new", "there"] = "new"
    if pool is not None and source.name in pool:
        _check_same(source, pool)
        kind = "there"
    return Verdict(source, kind, info=info, gate=gate is not None)


def _check_same(source: Source, pool: ExpertPool) -> None:
    card = pool.expert(source.name).card()
    hashes = source.sha256()
    files = card.get("files", {})
    if hashes not in (card.get("origin", {}).get("sha256"), {file: files.get(file) for file in hashes}):
        raise GliderError(
            f"pool {pool.path} has another expert {source.name!r}; remove it first or write NAME={source.origin}"
        )


def common_base(verdicts: Sequence[Verdict]) -> str:
    """The base that the adapters name in their configs.

    Raises:
        GliderError: they name none, or several.
    """
    named: dict[str, str] = {}
    for verdict in verdicts:
        if base := verdict.source.base:
            named.setdefault(base, verdict.source.name)
    if not named:
        raise GliderError("no adapter names its base model; add base=FOLDER or a hub id")
    if len(named) > 1:
        (one, first), (other, second) = list(named.items())[:2]
        raise GliderError(
            f"the adapters name different bases ({first!r}: {one}, {second!r}: {other}); "
            "if they fit one base all the same, name it with base="
        )
    return next(iter(named))


def write(
    pool: ExpertPool, verdicts: Sequence[Verdict], card_of: Callable[[Source], dict[str, Any]]
) -> tuple[int, int]:
    """Copy the new adapters into the pool; returns how many were new and how many were there already.

    Args:
        card_of: what else an adapter's card gets.

    Raises:
        GliderError: another process has just added a different adapter under one of the names, or a file cannot
            be written; what was imported until then stays, and the same command goes on from there.
    """
    new = [verdict.source for verdict in verdicts if verdict.kind == "new"]
    there = len(verdicts) - len(new)
    for source in progress(new, desc="importing", enabled=len(new) > 20):
        origin = {"source": source.origin, "sha256": source.sha256(), "base": source.base}
        card = {**source.card(), **card_of(source), "origin": origin}

        def fill(folder: Path, source: Source = source) -> None:
            source.fill(folder, pool.base, pool.fingerprint.sites)

        try:
            pool.write(source.name, fill, card, replace=False)
        except FileExistsError:
            _check_same(source, pool)
            there += 1
        except OSError as error:
            raise GliderError(
                f"{source.name} cannot be imported from {source.origin} ({error.strerror or error}); "
                "run the same command again once that is mended"
            ) from None
    return len(verdicts) - there, there


def verdict_table(verdicts: Sequence[Verdict]) -> str:
    """One line per adapter: name, sites, rank, dtype, size and what becomes of it."""
    words = {"new": "ok", "there": "already there"}
    rows = []
    for verdict in verdicts:
        cells = ["-"] * 5
        if verdict.info is not None:
            ranks = verdict.info.ranks.values()
            cells = [
                str(len(ranks)),
                span(min(ranks), max(ranks)),
                verdict.info.dtype,
                megabytes(verdict.info.size),
                "yes" if verdict.gate else "no",
            ]
        rows.append([verdict.source.name, *cells, words.get(verdict.kind) or f"refused: {verdict.reason}"])
    titles = ("name", "sites", "rank", "dtype", "MB", "gate", "")
    return table(titles, rows, right=("sites", "rank", "MB"), cut=False)
