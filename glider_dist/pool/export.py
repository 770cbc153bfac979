"""Taking experts out of a pool: as PEFT folders, as one merged adapter, or for vLLM.

Legend: r rank of an expert, R sum or maximum of ranks, d and o widths.
"""

from __future__ import annotations

import logging
import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from glider_dist.errors import GliderError
from glider_dist.pool.adapter import (
    CARD_FILE,
    GATE_FILE,
    WEIGHTS_FILE,
    SiteLora,
    target_modules,
    write_adapter,
)
from glider_dist.pool.adapter_config import CONFIG_FILE
from glider_dist.pool.expert import Expert
from glider_dist.pool.files import read_json, replacing, replacing_folder, write_json
from glider_dist.pool.store import ExpertPool
from glider_dist.tracking.progress import progress

log = logging.getLogger(__name__)
# What `vllm serve --max-lora-rank` takes.
_VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)


def chosen(pool: ExpertPool, names: Sequence[str]) -> list[Expert]:
    """The named experts, all of them if none is named.

    Raises:
        GliderError: there is no such expert, or the pool is empty.
    """
    experts = [pool.expert(name) for name in names or pool.names]
    if not experts:
        raise GliderError(f"pool {pool.path} holds no experts")
    return experts


def export_peft(pool: ExpertPool, out: Path, names: Sequence[str] = ()) -> list[Path]:
    """Copy experts, byte for byte, as ``out/NAME`` with gate and card; folders already there are replaced."""
    folders = []
    experts = chosen(pool, names)
    for expert in progress(experts, desc="exporting", enabled=len(experts) > 20):
        with replacing_folder(out / expert.name) as folder:
            for file in (CONFIG_FILE, WEIGHTS_FILE, GATE_FILE, CARD_FILE):
                if (expert.folder / file).exists():
                    shutil.copyfile(expert.folder / file, folder / file)
        folders.append(out / expert.name)
    return folders


def merged_weights(experts: Sequence[Expert]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """The mean of the experts' ``s B A`` as one adapter ``{site: (A [R, d], B [o, R])}`` in fp32, scale 1.

    Exact: A are stacked and B laid side by side, so R is the sum of the ranks. Sites with fewer ranks than others
    are filled up with zeros. An expert without a site counts as zero there.
    """
    parts: dict[str, list[SiteLora]] = {}
    for expert in progress(experts, desc="merging", enabled=len(experts) > 20):
        for site, lora in expert.weights().items():
            parts.setdefault(site, []).append(lora)
    rank = max(sum(lora.A.shape[0] for lora in loras) for loras in parts.values())
    merged = {}
    for site, loras in parts.items():
        a_Rd = torch.cat([lora.A.float() for lora in loras])
        b_oR = torch.cat([lora.B.float() * (lora.scale / len(experts)) for lora in loras], dim=1)
        merged[site] = _filled(a_Rd, b_oR, rank)
    return merged


def _filled(a_rd: torch.Tensor, b_or: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    missing = rank - a_rd.shape[0]
    a_Rd = torch.cat([a_rd, a_rd.new_zeros(missing, a_rd.shape[1])])
    return a_Rd, torch.cat([b_or, b_or.new_zeros(b_or.shape[0], missing)], dim=1)


def export_merged(pool: ExpertPool, out: Path, names: Sequence[str] = ()) -> Path:
    """Write the mean of the experts as one PEFT adapter in ``out``.

    Raises:
        GliderError: the experts' configs disagree on how the base stores its weights (fan_in_fan_out).
    """
    experts = chosen(pool, names)
    configs = [expert.config() for expert in experts]
    transposed = {bool(config.get("fan_in_fan_out")) for config in configs}
    if len(transposed) > 1:
        raise GliderError("the experts differ in fan_in_fan_out, so they cannot become one adapter")
    weights = merged_weights(experts)
    _write_uniform(out, weights, configs[0], pool)
    if transposed == {True}:
        write_json(out / CONFIG_FILE, {**read_json(out / CONFIG_FILE), "fan_in_fan_out": True})
    return out


def _write_uniform(
    out: Path, weights: dict[str, tuple[torch.Tensor, torch.Tensor]], config: dict[str, Any], pool: ExpertPool
) -> None:
    rank = next(iter(weights.values()))[0].shape[0]
    targets = target_modules(weights, pool.fingerprint.sites)
    base = str(config.get("base_model_name_or_path") or pool.base)
    out.mkdir(parents=True, exist_ok=True)
    write_adapter(out, weights, float(rank), targets, base, str(config.get("task_type") or "CAUSAL_LM"))


def export_vllm(pool: ExpertPool, out: Path, names: Sequence[str] = (), base: str | None = None) -> Path:
    """Copy experts to ``out/NAME`` and write ``out/vllm.sh``, which serves them with vLLM; returns the script.

    vLLM reads one rank and one scale per adapter and ignores rank_pattern and alpha_pattern; an expert with
    such patterns is rewritten with its scale in B and zeros up to its largest rank, which computes the same.

    Args:
        base: the folder or hub id that vLLM serves unless the script is given another; None is the pool's.

    Raises:
        GliderError: an expert's rank is larger than vLLM takes.
    """
    experts = chosen(pool, names)
    highest = max(max(expert.summary(expert.card())["rank"]) for expert in experts)
    rank = next((rank for rank in _VLLM_RANKS if rank >= highest), None)
    if rank is None:
        raise GliderError(f"the largest rank is {highest}, but vLLM takes at most {_VLLM_RANKS[-1]}")
    export_peft(pool, out, names)
    for expert in experts:
        config = expert.config()
        if config.get("rank_pattern") or config.get("alpha_pattern"):
            _write_uniform(out / expert.name, _uniform(expert.weights()), config, pool)
            # The card's hashes belong to the files in the pool.
            (out / expert.name / CARD_FILE).unlink(missing_ok=True)
            log.info("%s has rank or alpha patterns, which vLLM ignores: written with one rank", expert.name)
    modules = " \\\n  ".join(shlex.quote(f"{expert.name}=") + f'"$here"/{expert.name}' for expert in experts)
    script = (
        "#!/bin/sh\n"
        "# Usage: vllm.sh [BASE] [vLLM options]. A request names an expert as its model.\n"
        f"base={shlex.quote(base or pool.base)}\n"
        'case "${1:--}" in -*) ;; *) base=$1; shift ;; esac\n'
        'here=$(cd "$(dirname "$0")" && pwd)\n'
        # One batch can hold as many adapters as --max-loras says, by default one.
        f'exec vllm serve "$base" --enable-lora --max-lora-rank {rank} --max-loras {min(len(experts), 8)} '
        f'--lora-modules \\\n  {modules} \\\n  "$@"\n'
    )
    path = out / "vllm.sh"
    with replacing(path) as temporary:
        temporary.write_text(script)
        temporary.chmod(0o755)
    return path


def _uniform(weights: dict[str, SiteLora]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    rank = max(lora.A.shape[0] for lora in weights.values())
    filled = {}
    for site, lora in weights.items():
        a_Rd, b_oR = _filled(lora.A, (lora.B.float() * lora.scale).to(lora.B.dtype), rank)
        filled[site] = (a_Rd, b_oR)
    return filled
