"""From text to a batch the model can run, and the likelihood of the targets in it.

Causal models are padded on the left, so that all answers end in the last column and the output head need run on
the answers' positions only; encoder-decoder models are padded on the right.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from glider_dist.errors import GliderError
from glider_dist.model.base import BaseModel
from glider_dist.routing.local import at_least_fp32

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Encoded:
    """Token ids of a prompt and of its answer, the end token included; the answer may be empty."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.prompt) + len(self.answer)


@dataclass(frozen=True)
class Batch:
    """Inputs of one forward.

    Attributes:
        inputs: what the model's forward takes; tensors ``[B, S]``.
        answers: ``[N]`` target ids, those of a row one after another.
        rows, columns: ``[N]`` int64, where the model predicts each of them, among its last ``length`` predictions.
            The host lays the targets out, so that nothing has to wait for a mask to be searched on a device.
        length: of the longest answer.
        tokens: entries of the padded input, padding included.
        targets: number of targets per row, ``[B]``.
    """

    inputs: dict[str, Any]
    answers: torch.Tensor
    rows: torch.Tensor
    columns: torch.Tensor
    length: int
    tokens: int
    targets: torch.Tensor


class Collator:
    """Tokenises and pads for one base model."""

    def __init__(self, base: BaseModel, max_length: int):
        self.tokenizer: Any = base.tokenizer
        self.device = base.device
        self.max_length = max_length
        config: Any = base.model.config
        self.seq2seq = bool(config.is_encoder_decoder)
        self.pad = int(self.tokenizer.pad_token_id)
        start = getattr(config, "decoder_start_token_id", None)
        if self.seq2seq and start is None:
            raise GliderError(f"{base.source}: config.json has no decoder_start_token_id, which generation needs")
        self.start = int(start or 0)
        names = inspect.signature(base.model.forward).parameters
        self.takes_positions = "position_ids" in names and not self.seq2seq
        self.keeps_logits = "logits_to_keep" in names
        self._warned = False

    def encode(self, prompt: str, answer: str | None = None) -> Encoded:
        """Tokenise a prompt and, if given, its answer followed by the end token.

        A prompt that does not fit loses its middle (the instruction comes first, ``Output:`` last).

        Raises:
            GliderError: if the answer alone reaches ``tasks.max_length``.
        """
        answer_ids: list[int] = []
        if answer is not None:
            answer_ids = self.tokenizer(answer, add_special_tokens=False)["input_ids"]
            answer_ids = [*answer_ids, self.tokenizer.eos_token_id]
            if len(answer_ids) >= self.max_length:
                raise GliderError(
                    f"a target has {len(answer_ids)} tokens, but tasks.max_length is {self.max_length}: "
                    f"{answer.strip()[:40]!r}...; shorten it or raise the limit"
                )
        prompt_ids: list[int] = self.tokenizer(prompt)["input_ids"]
        room = self.max_length - (0 if self.seq2seq else len(answer_ids))
        if len(prompt_ids) > room:
            if not self._warned:
                log.warning(
                    "a prompt has %d tokens; the middle of such prompts is cut out to fit", len(prompt_ids)
                )
                self._warned = True
            head = room // 2
            prompt_ids = prompt_ids[:head] + prompt_ids[len(prompt_ids) - (room - head) :]
        return Encoded(tuple(prompt_ids), tuple(answer_ids))

    def prompts(self, encoded: Sequence[Encoded]) -> dict[str, torch.Tensor]:
        """``input_ids`` and ``attention_mask`` ``[B, S]`` of the prompts alone, for generation."""
        ids, mask = self.pad_rows([item.prompt for item in encoded], left=not self.seq2seq)
        return {"input_ids": ids, "attention_mask": mask}

    def batch(self, encoded: Sequence[Encoded]) -> Batch:
        """Pad prompts with their answers."""
        answers = [item.answer for item in encoded]
        length = max(map(len, answers))
        places = [
            (target, row, place if self.seq2seq else length - len(answer) + place)
            for row, answer in enumerate(answers)
            for place, target in enumerate(answer)
        ]
        found, rows, columns = self._there(torch.tensor(places, dtype=torch.int64).view(-1, 3).t().contiguous())
        counts = self._there(torch.tensor([len(answer) for answer in answers]))
        made = partial(Batch, answers=found, rows=rows, columns=columns, length=length, targets=counts)
        if self.seq2seq:
            inputs: dict[str, Any] = self.prompts(encoded)
            shifted = [(self.start, *answer[:-1]) for answer in answers]
            inputs["decoder_input_ids"], inputs["decoder_attention_mask"] = self.pad_rows(shifted, left=False)
            tokens = inputs["input_ids"].numel() + inputs["decoder_input_ids"].numel()
            return made({**inputs, "use_cache": False}, tokens=tokens)
        ids, mask = self.pad_rows([item.prompt + item.answer for item in encoded], left=True)
        inputs = {"input_ids": ids, "attention_mask": mask, **self.positions(mask)}
        if self.keeps_logits:
            inputs["logits_to_keep"] = length + 1
        return made({**inputs, "use_cache": False}, tokens=ids.numel())

    def positions(self, mask: torch.Tensor) -> dict[str, torch.Tensor]:
        """Position ids that ignore left padding, for models that take them."""
        return {"position_ids": (mask.cumsum(1) - 1).clamp_min(0)} if self.takes_positions else {}

    def dummy(self) -> Batch:
        """One row of two tokens, for a rank without work."""
        return self.batch([Encoded((self.pad,), (self.pad,))])

    def pad_rows(self, rows: Sequence[Sequence[int]], left: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids and mask ``[B, longest]`` int64."""
        width = max(len(row) for row in rows)
        ids = torch.full((len(rows), width), self.pad)
        mask = torch.zeros(len(rows), width, dtype=torch.int64)
        for index, row in enumerate(rows):
            where = slice(width - len(row), width) if left else slice(0, len(row))
            ids[index, where] = torch.tensor(row, dtype=torch.int64)
            mask[index, where] = 1
        return self._there(ids), self._there(mask)

    def _there(self, tensor: torch.Tensor) -> torch.Tensor:
        # Without waiting for what a GPU still has to do: when this returns, CUDA has read the (pageable) memory.
        return tensor.to(self.device, non_blocking=True)


def target_nll(model: Any, batch: Batch) -> torch.Tensor:
    """Negative log-likelihood of each row's targets, summed over them; ``[B]`` nats in fp32 (fp64 for an fp64
    base), differentiable."""
    logits = model(**batch.inputs).logits
    if "decoder_input_ids" not in batch.inputs:
        logits = logits[:, -batch.length - 1 : -1]
    # Only where there is a target: a vocabulary in fp32 is the largest tensor of a step.
    at = batch.rows, batch.columns
    losses = F.cross_entropy(at_least_fp32(logits[at]), batch.answers, reduction="none")
    return losses.new_zeros(len(batch.targets), batch.length).index_put(at, losses).sum(1)
