"""What joint training may add to the routers: balance and z losses, noise, experts left out. All off by default.

All of it is the same whatever the number of ranks and micro-batches, and when activations are recomputed: losses
are sums over tokens, and what is drawn at random follows from the seed, the step and the example's place in it.

Legend: T tokens of a micro-batch, E experts, B queries.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from glider_dist.model.tokens import Tokens
from glider_dist.parallel.exchange import in_backward
from glider_dist.seed import seed_of
from glider_dist.training.joint_batches import Row
from glider_dist.training.joint_settings import JointConfig


class RouterExtras:
    """The ``watch`` of a RoutingContext during training.

    Attributes:
        loads: ``{site: [E]}`` share of the tokens' places that each expert had in the last step, over the whole
            batch; empty before the first.
    """

    def __init__(self, joint: JointConfig, seed: int, top_k: int, sites: int):
        self.joint = joint
        self._sites = sites
        self.seed = seed
        self.top_k = top_k
        self.loads: dict[str, torch.Tensor] = {}
        self._step = 0
        self._rows: Sequence[Row] = ()
        self._sums: list[torch.Tensor] = []

    @property
    def watches(self) -> bool:
        return bool(self.joint.balance_loss or self.joint.z_loss or self.joint.router_noise)

    def begin(self, step: int, rows: Sequence[Row]) -> None:
        """A micro-batch of these rows follows."""
        self._step, self._rows, self._sums = step, rows, []

    def drop(self, similarity_BE: torch.Tensor) -> torch.Tensor:
        """Exclude each expert for each query with the chance ``expert_dropout``; ``top_k`` always remain."""
        chance = self.joint.expert_dropout
        if not chance or not self._rows:
            return similarity_BE
        dropped = similarity_BE.clone()
        for index, row in enumerate(self._rows):
            draw_E = torch.rand(similarity_BE.shape[1], generator=self._generator("dropout", row))
            # The luckiest remain, if too few would.
            kept = draw_E >= min(chance, float(draw_E.topk(min(self.top_k, len(draw_E))).values[-1]))
            dropped[index, ~kept] = float("-inf")
        return dropped

    def loss(self, tokens: int) -> torch.Tensor | None:
        """The losses of the micro-batch, as its part of the mean over ``tokens`` tokens of all sites."""
        if not self._sums:
            return None
        return torch.stack(self._sums).sum() / (tokens * self._sites)

    def __call__(self, site: str, tokens: Tokens, scores_TE: torch.Tensor) -> torch.Tensor:
        if not torch.is_grad_enabled() or not self._rows:
            return scores_TE
        if self.joint.router_noise:
            scores_TE = scores_TE + self._noise(site, tokens, scores_TE) * self.joint.router_noise
        if self.joint.balance_loss or self.joint.z_loss:
            total = self._losses(site, scores_TE)
            # When activations are recomputed, the operations must be repeated, too, but count once.
            if not in_backward():
                self._sums.append(total)
        return scores_TE

    def _losses(self, site: str, scores_TE: torch.Tensor) -> torch.Tensor:
        """``Σ_t (balance · E Σ_e f_e p_te + z · logsumexp(z_t)²)``.

        The load-balance loss of Switch Transformers (2101.03961, eq. 4), f being the last step's share over the
        whole batch, not that of this micro-batch: the sum then does not depend on how the batch is cut. The z-loss
        is that of ST-MoE (2202.08906, eq. 5).
        """
        served_T = ~scores_TE.isneginf().all(1)
        scores_TE = scores_TE[served_T]
        total = scores_TE.new_zeros(())
        if self.joint.balance_loss and site in self.loads:
            load_E = self.loads[site].to(scores_TE)
            total = total + self.joint.balance_loss * len(load_E) * (scores_TE.softmax(-1) @ load_E).sum()
        if self.joint.z_loss:
            total = total + self.joint.z_loss * scores_TE.logsumexp(-1).square().sum()
        return total

    def _noise(self, site: str, tokens: Tokens, scores_TE: torch.Tensor) -> torch.Tensor:
        counts = torch.bincount(tokens.row, minlength=len(self._rows)).tolist()
        parts = [
            torch.randn(count, scores_TE.shape[1], generator=self._generator(site, row))
            for count, row in zip(counts, self._rows, strict=True)
        ]
        return torch.cat(parts).to(scores_TE)

    def _generator(self, what: str, row: Row) -> torch.Generator:
        return torch.Generator().manual_seed(seed_of(self.seed, what, str(self._step), str(row.place)))


def shares_of(counts: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """From tokens per expert to their share; all zeros (no tokens) stay so."""
    return {site: count / max(1.0, float(count.sum())) for site, count in counts.items()}
