"""Which layers of a model experts may adapt."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peft
import pytest
from transformers import LlamaConfig, LlamaForSequenceClassification, PreTrainedModel

from glider_dist.model.sites import linear_sites
from glider_dist.testing import tiny_causal, tiny_encoder_decoder, tiny_qwen, tiny_seq2seq


def all_linear(model: PreTrainedModel, task_type: str) -> set[str]:
    """The layers that PEFT adapts under target_modules="all-linear"."""
    config = peft.LoraConfig(r=1, target_modules="all-linear", task_type=task_type)
    adapted = peft.get_peft_model(model, config)
    return {
        name.removeprefix("base_model.model.")
        for name, module in adapted.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }


@pytest.mark.parametrize(
    ("make", "task_type"), [(tiny_causal, "CAUSAL_LM"), (tiny_qwen, "CAUSAL_LM"), (tiny_seq2seq, "SEQ_2_SEQ_LM")]
)
def test_the_sites_of_a_language_model_are_those_of_pefts_all_linear(
    make: Callable[[], Any], task_type: str
) -> None:
    assert set(linear_sites(make())) == all_linear(make(), task_type)


def test_poolers_and_what_computes_the_vocabulary_are_no_sites() -> None:
    sites = linear_sites(tiny_encoder_decoder())
    left_out = all_linear(tiny_encoder_decoder(), "SEQ_2_SEQ_LM") - set(sites)
    assert left_out == {"encoder.pooler.dense", "decoder.cls.predictions.transform.dense"}
    assert "decoder.bert.encoder.layer.1.crossattention.self.query" in sites


def test_a_classification_head_is_no_site() -> None:
    config = LlamaConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    sites = linear_sites(LlamaForSequenceClassification(config))
    assert sites
    assert "score" not in sites
