"""``glider-dist bench WHAT``: one command for all measurements."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from glider_dist.errors import GliderError

if TYPE_CHECKING:
    from glider_dist.cli import Arguments

USAGE = """usage: glider-dist bench layer [--ranks 1]
       glider-dist bench dispatch [--ranks N]
       glider-dist bench embeddings
       deepspeed --num_gpus N --module glider_dist bench evaluate [CONFIG.yaml] [key=value ...]

layer       a routed layer in one process, against one LoRA, a loop over experts, and every expert on every token
dispatch    one exchange between N processes on gloo, by each strategy, forward and backward
embeddings  the embedding service against the bare model: throughput at 1, 8 and 32 clients, cached texts, memory
evaluate    seconds per query of evaluate.routers and their ratios to the base alone (settings of evaluate)

Each prints a table and writes bench_WHAT.json into run_dir (default runs/bench).
"""


def run(arguments: Arguments) -> int:
    """Raises GliderError for an unknown measurement."""
    what = arguments.text or "nothing"
    if what == "evaluate":
        from glider_dist.bench import evaluation
        from glider_dist.cli import run_stage
        from glider_dist.settings import read_config

        run_stage("bench", read_config(arguments.file, arguments.overrides, {}), evaluation.run)
        return 0
    from glider_dist.bench import dispatch, embeddings, layer

    folder = _folder(arguments)
    if what == "layer":
        layer.run(folder)
    elif what == "dispatch":
        dispatch.run(folder, arguments.ranks or 2)
    elif what == "embeddings":
        embeddings.run(folder)
    else:
        raise GliderError(f"bench knows layer, dispatch, embeddings and evaluate, not {what!r}")
    return 0


def _folder(arguments: Arguments) -> Path:
    folder = Path("runs/bench")
    for override in arguments.overrides:
        key, _, value = override.partition("=")
        if key != "run_dir":
            raise GliderError(f"this measurement takes run_dir=FOLDER, not {override}")
        folder = Path(value)
    return folder
