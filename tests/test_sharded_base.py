"""A base loaded in shards for ZeRO 3: no rank ever holds it whole, and it computes what the whole one does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from rank_checkpoints import here

from glider_dist.job import Job
from glider_dist.model.base import load_base
from glider_dist.model.cache import weights_hash
from glider_dist.pool import Fingerprint
from glider_dist.settings import read_config
from glider_dist.testing import LocalRanks, save_tiny_base, tiny_causal, tiny_qwen, tiny_seq2seq

WORDS = torch.arange(4, 28).view(2, 12)
MODELS = {"untied": tiny_causal, "tied": tiny_qwen, "encoder-decoder": tiny_seq2seq}


def logits(model: torch.nn.Module, seq2seq: bool) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(WORDS, **({"decoder_input_ids": WORDS} if seq2seq else {})).logits
    return found


def load(base: str, seq2seq: bool) -> tuple[int, int, torch.Tensor, Fingerprint]:
    """Numbers that a rank holds after loading, bytes that it keeps in the engine, logits, fingerprint."""
    cfg = read_config(None, [f"base={base}", "zero_stage=3", "device=cpu", "dtype=float32"])
    job = Job(cfg, "train-experts", here())
    held = sum(p.numel() for p in job.base.model.parameters())
    frozen = job.frozen
    return held, frozen.local_bytes, logits(frozen.model, seq2seq), job.fingerprint


@pytest.mark.jobs
@pytest.mark.parametrize("kind", [*MODELS])
def test_ranks_load_only_their_shares(kind: str, tmp_path: Path, local_ranks: Callable[[int], LocalRanks]) -> None:
    save_tiny_base(tmp_path, MODELS[kind]())
    seq2seq = kind == "encoder-decoder"
    plain = load_base(str(tmp_path), "float32", "cpu").model
    whole = sum(p.numel() for p in plain.parameters())
    found = local_ranks(2).run(load, str(tmp_path), seq2seq)
    for held, kept, logits_of_rank, fingerprint in found:
        assert held == 0
        assert whole * 4 / 2 <= kept <= whole * 4 / 2 + 4 * len(list(plain.parameters()))
        assert torch.allclose(logits_of_rank, logits(plain, seq2seq), rtol=1e-5, atol=1e-5)
        assert fingerprint == found[0][3]
        assert fingerprint.sites


def read_hash(base: str, stage: int, nodes: str) -> tuple[list[str], Fingerprint]:
    """Folders that this rank read to hash them, and the fingerprint; each letter is the node of a rank."""
    read: list[str] = []

    def hashed(folder: Path) -> str | None:
        read.append(str(folder))
        return weights_hash(folder)

    ranks = here()
    with (
        patch("glider_dist.model.base.weights_hash", hashed),
        patch("socket.gethostname", lambda: nodes[ranks.rank]),
    ):
        cfg = read_config(None, [f"base={base}", f"zero_stage={stage}", "device=cpu", "dtype=float32"])
        return read, Job(cfg, "train-experts", ranks).fingerprint


@pytest.mark.jobs
@pytest.mark.parametrize(("stage", "nodes", "readers"), [(3, "ab", [0]), (0, "aa", [0]), (0, "aba", [0, 1])])
def test_weights_are_hashed_once_a_node_or_by_the_one_rank_that_reads_them(
    stage: int, nodes: str, readers: list[int], tmp_path: Path, local_ranks: Callable[[int], LocalRanks]
) -> None:
    save_tiny_base(tmp_path, tiny_causal())
    found = local_ranks(len(nodes)).run(read_hash, str(tmp_path), stage, nodes)
    assert [rank for rank, (read, _) in enumerate(found) if read] == readers
    assert all(fingerprint == found[0][1] for _, fingerprint in found)
    assert found[0][1].weights == weights_hash(tmp_path)
