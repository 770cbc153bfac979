"""Placement: which rank of an expert-parallel group owns which expert. Any number of experts, any group size."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from glider_dist.errors import GliderError
from glider_dist.pool.files import digest_of, write_json


@dataclass(frozen=True)
class Placement:
    """Owners of E experts among P ranks.

    Attributes:
        names: the experts, in the pool's order (their ids).
        owner: for each expert the position of its rank in the group, in ``[0, P)``.
        ranks: P.
        kind: the ``mesh.placement`` that made it, if that is known.
        load_sha256: of the load that it evens out.
    """

    names: tuple[str, ...]
    owner: tuple[int, ...]
    ranks: int
    kind: str | None = None
    load_sha256: str | None = None

    def __post_init__(self) -> None:
        if len(self.owner) != len(self.names) or any(not 0 <= rank < self.ranks for rank in self.owner):
            raise GliderError(
                f"a placement of {len(self.names)} experts needs an owner in [0, {self.ranks}) for each"
            )

    def owned(self, rank: int) -> list[int]:
        """Ids of the experts that ``rank`` owns, ascending: their order in its bank."""
        return [expert for expert, owner in enumerate(self.owner) if owner == rank]

    @property
    def slot(self) -> tuple[int, ...]:
        """For each expert its position in its owner's bank."""
        filled = [0] * self.ranks
        slots = []
        for owner in self.owner:
            slots.append(filled[owner])
            filled[owner] += 1
        return tuple(slots)

    @property
    def origin(self) -> str:
        """How it was made, in words."""
        by = f" by the load {self.load_sha256[:12]}" if self.load_sha256 else ""
        return f"{self.kind or 'of unknown origin'}{by}, over {self.ranks} ranks"

    def is_made(self, names: Sequence[str], ranks: int, kind: str, load: str | None) -> bool:
        """Whether it was made of these experts, in any order, over so many ranks, as ``mesh.placement`` and
        ``mesh.load`` say.

        Raises:
            GliderError: see :func:`load_of`. A load that is gone is taken not to have changed.
        """
        if (self.ranks, self.kind) != (ranks, kind) or set(self.names) != set(names):
            return False
        path = Path(load or "")
        return kind != "balanced" or not path.exists() or digest_of(load_of(path)) == self.load_sha256

    def save(self, path: Path) -> None:
        owned = {str(rank): [self.names[expert] for expert in self.owned(rank)] for rank in range(self.ranks)}
        how = {"kind": self.kind, "load_sha256": self.load_sha256}
        write_json(path, {"ranks": self.ranks, **how, "experts": owned})

    def of(self, names: Sequence[str]) -> Placement:
        """The same placement with the experts in this order."""
        owner = dict(zip(self.names, self.owner, strict=True))
        return replace(self, names=tuple(names), owner=tuple(owner[name] for name in names))

    @staticmethod
    def load(path: Path) -> Placement:
        """Raises GliderError if the file is broken."""
        try:
            plain: dict[str, Any] = json.loads(path.read_text())
            place = {name: int(rank) for rank, owned in plain["experts"].items() for name in owned}
            ranks = int(plain["ranks"])
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise GliderError(f"{path} is no placement ({error}); remove it to place the experts anew") from None
        return Placement(tuple(place), tuple(place.values()), ranks, plain.get("kind"), plain.get("load_sha256"))

    def __str__(self) -> str:
        """A line per rank."""
        lines = []
        for rank in range(self.ranks):
            owned = [self.names[expert] for expert in self.owned(rank)]
            shown = ", ".join(owned[:6]) + (", ..." if len(owned) > 6 else "")
            lines.append(f"rank {rank}: {len(owned)} experts: {shown}" if owned else f"rank {rank}: no expert")
        return "\n".join(lines)


def contiguous(names: Sequence[str], ranks: int) -> Placement:
    """Equal shares in the pool's order; the first ``E mod P`` ranks own one more."""
    share, more = divmod(len(names), ranks)
    owner = [rank for rank in range(ranks) for _ in range(share + (rank < more))]
    return Placement(tuple(names), tuple(owner), ranks)


def balanced(names: Sequence[str], ranks: int, load: Mapping[str, float]) -> Placement:
    """Even out what the ranks will serve: the heaviest expert first, to the rank with the least load so far.

    No rank owns more than one expert above an equal share, so that memory stays even, too.

    Args:
        load: tokens per expert, as in the routing statistics of an earlier run; missing experts count as 0.
    """
    order = sorted(range(len(names)), key=lambda expert: (-load.get(names[expert], 0.0), expert))
    owner = [0] * len(names)
    total, count = [0.0] * ranks, [0] * ranks
    room = -(-len(names) // ranks)
    for expert in order:
        open_ranks = [rank for rank in range(ranks) if count[rank] < room]
        rank = min(open_ranks, key=lambda rank: (total[rank], count[rank], rank))
        owner[expert] = rank
        total[rank] += load.get(names[expert], 0.0)
        count[rank] += 1
    return Placement(tuple(names), tuple(owner), ranks)


def place(names: Sequence[str], ranks: int, kind: str, load: str | None) -> Placement:
    """As ``mesh.placement`` and ``mesh.load`` say; raises GliderError as :func:`load_of`."""
    if kind != "balanced":
        return replace(contiguous(names, ranks), kind=kind)
    tokens = load_of(Path(load or ""))
    return replace(balanced(names, ranks, tokens), kind=kind, load_sha256=digest_of(tokens))


def load_of(path: Path) -> dict[str, float]:
    """Tokens per expert of an earlier evaluation, summed over its routers.

    Args:
        path: the ``results.json`` of its run directory.

    Raises:
        GliderError: the file is missing or is no such report.
    """
    load: dict[str, float] = {}
    try:
        for routing in json.loads(path.read_text())["routing"].values():
            for name, tokens in routing["tokens_per_expert"].items():
                load[name] = load.get(name, 0.0) + float(tokens)
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise GliderError(f"mesh.load={path} holds no routing statistics ({error}); name a results.json") from None
    return load
