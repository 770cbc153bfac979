"""What ``pool ls`` and ``pool show`` print."""

from __future__ import annotations

from collections import Counter
from typing import Any

from glider_dist.pool.expert import Expert
from glider_dist.pool.store import ExpertPool
from glider_dist.text_table import megabytes, span, table


def list_pool(pool: ExpertPool) -> str:
    """One line per expert and the totals, from the cards alone (headers where a card has no summary)."""
    rows = []
    total = gates = described = 0
    for expert in pool.experts():
        card = expert.card()
        summary = expert.summary(card)
        descriptions = card.get("descriptions") or card.get("readme") or [""]
        has_gate = expert.has_gate_by(card)
        total += summary["bytes"]
        gates += has_gate
        described += bool(card.get("descriptions"))
        rows.append(
            [
                expert.name,
                span(*summary["rank"]),
                str(summary["sites"]),
                megabytes(summary["bytes"]),
                summary["dtype"],
                "yes" if has_gate else "no",
                score(card),
                str(descriptions[0]),
            ]
        )
    titles = ("name", "rank", "sites", "MB", "dtype", "gate", "loss", "description")
    text = table(titles, rows, right=("rank", "sites", "MB", "loss"))
    return (
        f"{text}\n{len(rows)} experts for {pool.base}, {megabytes(total)} MB, {gates} with a gate, "
        f"{described} described"
    )


def score(card: dict[str, Any]) -> str:
    """The validation loss that training noted in the card, or nothing."""
    value = (card.get("scores") or {}).get("validation_loss")
    return f"{value:.3f}" if isinstance(value, (int, float)) else ""


def show_expert(expert: Expert) -> str:
    """Everything the pool knows about one expert."""
    card = expert.card()
    config = expert.config()
    weights = expert.weights()
    kinds = Counter(
        (site.rsplit(".", 1)[-1], lora.B.shape[0], lora.A.shape[1], lora.A.shape[0], f"{lora.scale:g}")
        for site, lora in weights.items()
    )
    rows = [
        [name, str(count), f"{d_out} x {d_in}", str(rank), scale]
        for (name, d_out, d_in, rank, scale), count in sorted(kinds.items())
    ]
    lines = [f"name: {expert.name}", f"folder: {expert.folder}"]
    lines += [
        f"gate: {'yes' if expert.has_gate_by(card) else 'no'}",
        f"base: {config.get('base_model_name_or_path')}",
    ]
    for key, value in card.items():
        if key not in ("name", "files"):
            lines += _lines(key, value)
    lines += [f"sha256 of {file}: {digest}" for file, digest in card.get("files", {}).items()]
    return "\n".join(lines) + "\n\n" + table(("layers", "sites", "shape", "rank", "scale"), rows)


def _lines(key: str, value: Any) -> list[str]:
    if isinstance(value, dict):
        return [f"{key}:", *(f"  {inner}: {text}" for inner, text in value.items())]
    if isinstance(value, list) and value and isinstance(value[0], str):
        return [f"{key}:", *(f"  {text}" for text in value)]
    return [f"{key}: {value}"]
