"""What the tests of routed models share: tiny models, and weights of the global score that make a difference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from glider_dist.testing import tiny_causal, tiny_encoder_decoder, tiny_opt, tiny_qwen, tiny_seq2seq

NEVER = float("-inf")
MODELS: dict[str, Callable[[], Any]] = {
    "llama": tiny_causal,
    "qwen": tiny_qwen,
    "opt": tiny_opt,
    "t5": tiny_seq2seq,
    "bert": tiny_encoder_decoder,
}
CAUSAL = ("llama", "qwen", "opt")
ALL_WAYS = pytest.mark.parametrize("way", ["sorted", "every", "each"], indirect=True)
ALPHAS: dict[str, Any] = {"alpha_in": 6.0, "alpha_out": 1.5, "threshold": 0.5}
