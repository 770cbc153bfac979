"""What local scores compare tokens with, per site: made once, from the experts or from what the pool keeps.

Legend: E experts, d width of the site's input, r rank, q = min(d_out, r).
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from glider_dist.errors import GliderError
from glider_dist.lora.bank import SiteBank
from glider_dist.lora.lag import norm_factors
from glider_dist.routing.local import arrow_prototypes, gate_prototypes
from glider_dist.routing.strategies import Local


class Prototypes:
    """The prototypes of one attached model.

    Attributes:
        stored: functions that read what the pool keeps for ``"arrow"`` and ``"activation"`` as
            ``{site: [E, d]}``; empty if there is no pool.
    """

    def __init__(self, gates: dict[str, torch.Tensor]):
        self.gates = gates
        self.stored: dict[str, Callable[[], dict[str, torch.Tensor]]] = {}
        self._made: dict[tuple[str, tuple[int, ...]], dict[str, torch.Tensor]] = {}

    def load_activations(self, banks: dict[str, SiteBank]) -> None:
        """Raises GliderError if the pool lacks them."""
        if ("activation", ()) in self._made:
            return
        if "activation" not in self.stored:
            raise GliderError("router 'average_activation' needs the activations that a pool keeps; attach a pool")
        means = self.stored["activation"]()
        made = {site: gate_prototypes(mean).to(banks[site].A.device) for site, mean in means.items()}
        self._made["activation", ()] = made

    def forget_gates(self) -> None:
        """The gates have changed."""
        self._made.pop(("gate", ()), None)

    def of(self, local: Local, site: str, bank: SiteBank, general: tuple[int, ...]) -> torch.Tensor:
        """``[E, d]`` in fp32 (fp64 for fp64 experts).

        Args:
            bank: the experts that are computed: less the ``general`` ones if there are such.
        """
        kind = "arrow" if local == "lag" else local
        if kind == "gate" and self.gates[site].requires_grad:
            return gate_prototypes(self.gates[site])
        known = self._made.setdefault((kind, general), {})
        if site not in known:
            # Kept for later forwards, which may need gradients even if this one does not.
            with torch.inference_mode(False), torch.no_grad():
                if kind == "gate":
                    known[site] = gate_prototypes(self.gates[site]).to(bank.A.device)
                elif "arrow" in self.stored and not general:
                    known.update({name: made.to(bank.A.device) for name, made in self.stored["arrow"]().items()})
                else:
                    known[site] = arrow_prototypes(bank.A, bank.B.transpose(1, 2))
        return known[site]

    def factors(self, site: str, bank: SiteBank, general: tuple[int, ...]) -> torch.Tensor:
        """What LAG's norms need; ``[E, r, q]``."""
        known = self._made.setdefault(("lag", general), {})
        if site not in known:
            with torch.inference_mode(False), torch.no_grad():
                known[site] = norm_factors(bank)
        return known[site]
