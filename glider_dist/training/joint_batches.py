"""The batches of joint training: the same examples in every step whatever the number of ranks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from glider_dist.errors import GliderError
from glider_dist.model.batch import Collator, Encoded
from glider_dist.model.example import encode_example
from glider_dist.tasks.task import Example, Task
from glider_dist.training.batches import Packing, cuts
from glider_dist.training.order import step_indices


@dataclass(frozen=True)
class Row:
    """One example.

    Attributes:
        query: what is embedded for the global router.
        encoded: prompt and answer.
        place: position in its step's batch.
    """

    query: str
    encoded: Encoded
    place: int


class Mixture:
    """One part of several tasks as one list of examples, encoded when asked for."""

    def __init__(self, tasks: Sequence[Task], part: str, collator: Collator, limit: int | None = None):
        self.part = part
        self.collator = collator
        self.examples: list[tuple[Task, Example]] = [
            (task, example) for task in tasks for example in task.examples(part)[:limit]
        ]
        if not self.examples:
            raise GliderError(f"the held-in tasks have no {part} examples")

    def __len__(self) -> int:
        return len(self.examples)

    def row(self, index: int, place: int) -> Row:
        """Raises GliderError, naming the example, for a target too long."""
        task, example = self.examples[index]
        return Row(*encode_example(self.collator, task, self.part, example), place)

    def rows(self) -> list[Row]:
        return [self.row(index, index) for index in range(len(self))]

    def steps(self, seed: int, batch_size: int, steps: int, done: int = 0) -> Iterator[list[Row]]:
        """The rows of each step's global batch, but for those of the steps that are done; their order follows from
        the seed alone."""
        for chosen in islice(step_indices(seed, "train-joint", len(self), batch_size, steps), done, None):
            yield [self.row(index, place) for place, index in enumerate(chosen)]


def share(rows: Sequence[Row], ranks: int) -> list[list[Row]]:
    """Each rank's rows: equally many (up to one), and about as many tokens; ascending in length."""
    ordered = sorted(rows, key=lambda row: (len(row.encoded), row.place))
    shares: list[list[Row]] = [[] for _ in range(ranks)]
    for index, row in enumerate(ordered):
        turn, at = divmod(index, ranks)
        shares[at if turn % 2 == 0 else ranks - 1 - at].append(row)
    return shares


def micro_batches(rows: Sequence[Row], ranks: int, packing: Packing) -> list[list[list[Row]]]:
    """For each rank its micro-batches, equally many for all of them; the last ones of a rank may be empty."""
    found = []
    for part in share(rows, ranks):
        ends = cuts([len(row.encoded) for row in part], packing, packing.overhead)
        found.append([part[start:end] for start, end in ends])
    most = max(map(len, found))
    return [part + [[] for _ in range(most - len(part))] for part in found]
