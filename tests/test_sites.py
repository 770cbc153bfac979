"""Which layers of a model experts may adapt."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peft
import pytest
from transformers import (
    LlamaConfig,
    LlamaForSequenceClassification,
    ModernBertDecoderConfig,
    ModernBertDecoderForCausalLM,
    PreTrainedModel,
)

from glider_dist.model.sites import every_linear, language_model, linear_sites
from glider_dist.testing import tiny_causal, tiny_encoder_decoder, tiny_opt, tiny_qwen, tiny_seq2seq


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


def test_tokens_are_found_where_they_run_whatever_a_model_calls_its_decoder() -> None:
    small: dict[str, Any] = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 16, "vocab_size": 64}
    named_so = ModernBertDecoderForCausalLM(ModernBertDecoderConfig(**small, intermediate_size=16, pad_token_id=0))
    assert named_so.get_decoder() is named_so.get_output_embeddings()
    assert language_model(named_so) is named_so.model
    assert set(linear_sites(named_so)) == set(every_linear(named_so)) != set()
    opt = tiny_opt()
    assert language_model(opt) is opt.model.decoder


def test_a_classification_head_is_no_site() -> None:
    config = LlamaConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    sites = linear_sites(LlamaForSequenceClassification(config))
    assert sites
    assert "score" not in sites
