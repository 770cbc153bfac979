"""Sites that read the same input share one exchange: q, k and v; gate and up; keys and values of the encoder.

Which ones do is seen in the first forward, not taken from a list of names: sites that are called one after another
with the same tensor form a group. From the second forward on, the first site of a group computes for all of them,
and the others pick up what was made for them. The model is the same on all ranks, so the groups are, too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from glider_dist.parallel.exchange import in_backward

Compute = Callable[[Sequence[str], torch.Tensor], list[torch.Tensor]]
"""From the sites of a group and their input to what the experts add at each."""


class SharedInputs:
    """Finds the groups, and hands each site its part.

    Attributes:
        groups: ``{first site: all sites}`` as seen so far.
    """

    def __init__(self) -> None:
        self.groups: dict[str, tuple[str, ...]] = {}
        self._used: dict[str, tuple[str, ...]] = {}
        self._input: torch.Tensor | None = None
        self._seen: list[str] = []
        self._made: dict[str, torch.Tensor] = {}

    def delta(self, site: str, x: torch.Tensor, compute: Compute) -> torch.Tensor:
        """What the experts add at ``site`` for ``x``, computed now or with an earlier site of its group."""
        if x is not self._input or site in self._seen:
            self.finish()
            self._input = x
        self._seen.append(site)
        if site not in self._made:
            # Recomputed activations must be made as they were, though more may be known by now.
            group = (self._used if in_backward() else self.groups).get(site, (site,))
            self._used[site] = group
            self._made.update(zip(group, compute(group, x), strict=True))
        return self._made.pop(site)

    def finish(self) -> None:
        """The input will not be read again: remember who read it, drop what nobody picked up."""
        if self._seen:
            known = self.groups.get(self._seen[0], ())
            if len(self._seen) > len(known):
                self.groups[self._seen[0]] = tuple(self._seen)
        self._input = None
        self._seen, self._made = [], {}
