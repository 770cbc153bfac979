"""Tiny models and pools with random weights, and local ranks to run them on, for tests of code that uses this
package. Nothing is downloaded.

The models have two layers per stack and a vocabulary of 256, are in fp32 and eval mode, and follow from their seed
alone. Ids 0 to 3 are the pad, end, unknown and start token of :func:`tiny_tokenizer`.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    BertConfig,
    EncoderDecoderConfig,
    EncoderDecoderModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from glider_dist.errors import GliderError
from glider_dist.model.sites import fingerprint, linear_sites, peft_targets
from glider_dist.parallel.local_ranks import LocalRanks
from glider_dist.pool import ExpertPool
from glider_dist.pool.adapter import write_adapter
from glider_dist.pool.files import write_tensors

__all__ = [
    "VOCABULARY",
    "LocalRanks",
    "random_pool",
    "save_tiny_base",
    "tiny_causal",
    "tiny_encoder_decoder",
    "tiny_opt",
    "tiny_qwen",
    "tiny_seq2seq",
    "tiny_tokenizer",
]

VOCABULARY = 256
_SPECIAL = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>", "bos_token": "<s>"}
_IDS = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 3}
_DECODER: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    # Larger than usual: with the default, two layers of this width hardly depend on their input.
    "initializer_range": 0.15,
    **_IDS,
}


def tiny_causal(seed: int = 0, **config: Any) -> LlamaForCausalLM:
    """A Llama of width 48 with grouped-query attention; ``config`` overrides entries of its LlamaConfig."""
    return _seeded(LlamaForCausalLM, LlamaConfig(**{**_DECODER, **config}), seed)


def tiny_qwen(seed: int = 0, **config: Any) -> Qwen2ForCausalLM:
    """A Qwen2 of the same size, whose q, k and v have biases and whose head is tied to the embedding."""
    return _seeded(Qwen2ForCausalLM, Qwen2Config(**{**_DECODER, "tie_word_embeddings": True, **config}), seed)


def tiny_opt(seed: int = 0) -> OPTForCausalLM:
    """An OPT of width 48, whose head calls the decoder itself and whose positions follow from the mask."""
    keys = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings")
    size: dict[str, Any] = {key: _DECODER[key] for key in (*keys, *_IDS)}
    config = OPTConfig(ffn_dim=80, word_embed_proj_dim=48, init_std=_DECODER["initializer_range"], **size)
    return _seeded(OPTForCausalLM, config, seed)


def tiny_seq2seq(seed: int = 0, **config: Any) -> T5ForConditionalGeneration:
    """A T5 v1.1 (gated GELU, untied head), 2 + 2 layers of width 48."""
    settings = {
        "vocab_size": VOCABULARY,
        "d_model": 48,
        "d_kv": 12,
        "d_ff": 80,
        "num_layers": 2,
        "num_decoder_layers": 2,
        "num_heads": 4,
        "feed_forward_proj": "gated-gelu",
        "tie_word_embeddings": False,
        "decoder_start_token_id": 0,
        **_IDS,
    }
    return _seeded(T5ForConditionalGeneration, T5Config(**{**settings, **config}), seed)


def tiny_encoder_decoder(seed: int = 0) -> EncoderDecoderModel:
    """A BERT encoder and a BERT decoder with cross-attention, 2 + 2 layers of width 48."""
    keys = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    size: dict[str, Any] = {key: _DECODER[key] for key in (*keys, "initializer_range", *_IDS)}
    config = EncoderDecoderConfig.from_encoder_decoder_configs(
        BertConfig(**size),
        BertConfig(**size),
        decoder_start_token_id=3,
        tie_word_embeddings=False,
        vocab_size=VOCABULARY,
        **_IDS,
    )
    return _seeded(EncoderDecoderModel, config, seed)


def _seeded(kind: Any, config: Any, seed: int) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = kind(config)
    return model.float().eval()


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer that represents any text with fewer than 256 ids."""
    # These bytes occur in no UTF-8 text (byte-level tokenizers write them as the characters themselves).
    unused = {0xC0, 0xC1, *range(0xF5, 0x100)}
    letters = sorted(set(pre_tokenizers.ByteLevel.alphabet()) - {chr(byte) for byte in unused})
    tokens = [*_SPECIAL.values(), *letters]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **_SPECIAL)


def save_tiny_base(folder: str | os.PathLike[str], model: PreTrainedModel, tokenizer: bool = True) -> Path:
    """Save a model, and :func:`tiny_tokenizer` unless told not to, as a folder that ``base=FOLDER`` takes."""
    model.save_pretrained(folder)
    if tokenizer:
        tiny_tokenizer().save_pretrained(folder)
    return Path(folder)


def random_pool(
    path: str | os.PathLike[str],
    model: PreTrainedModel,
    experts: int | Sequence[str] = 5,
    rank: int = 4,
    seed: int = 0,
    gates: bool = True,
    ranks: Sequence[int] | None = None,
    sites: Sequence[Sequence[str] | None] | None = None,
    dtype: torch.dtype = torch.float32,
    base: str | None = None,
) -> ExpertPool:
    """A pool for ``model`` of experts whose A, B, scale and gates are random and far from trivial.

    Args:
        path: the pool's folder, not there yet or a pool for the same base.
        experts: how many (``expert_0``, ``expert_1``, ...), or their names.
        rank: rank of every expert unless ``ranks`` has one per expert.
        gates: give every expert a gate.
        sites: for each expert the ends of the names of the layers that it adapts, or None for all of them.
        dtype: dtype of A and B in the files; gates are fp32.
        base: what the pool notes as its base; None takes the name under which the model was loaded.

    Raises:
        GliderError: ``ranks`` or ``sites`` has another length than there are experts, or see
            :meth:`glider_dist.ExpertPool.add`.
    """
    names = [f"expert_{index}" for index in range(experts)] if isinstance(experts, int) else list(experts)
    if ranks is None:
        ranks = [rank] * len(names)
    if sites is None:
        sites = [None] * len(names)
    if not len(names) == len(ranks) == len(sites):
        raise GliderError(f"{len(names)} experts need as many ranks and sites, not {len(ranks)} and {len(sites)}")
    source = base or getattr(model.config, "_name_or_path", "") or "random"
    pool = ExpertPool.create(path, base=source, fingerprint=fingerprint(model))
    task_type = "SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM"
    generator = torch.Generator().manual_seed(seed)
    for index, (name, own_rank, targets) in enumerate(zip(names, ranks, sites, strict=True)):
        chosen = linear_sites(model, list(targets) if targets is not None else None)
        weights, gate = {}, {}
        for site, found in chosen.items():
            d_out, d_in = found.shape
            a = torch.randn(own_rank, d_in, generator=generator) / d_in**0.5
            b = torch.randn(d_out, own_rank, generator=generator) / own_rank**0.5
            weights[site] = (a.to(dtype), b.to(dtype))
            gate[site] = torch.randn(d_in, generator=generator) * 0.3
        with tempfile.TemporaryDirectory() as folder:
            adapter, gate_file = Path(folder), Path(folder) / "gate.safetensors"
            alpha = own_rank * (0.3 + 0.1 * (index % 5))
            write_adapter(adapter, weights, alpha, peft_targets(chosen, model), source, task_type)
            write_tensors(gate_file, gate)
            pool.add(name, adapter=adapter, gate=gate_file if gates else None)
    return pool
