"""``glider-dist bench WHAT``: one command for all measurements."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING

from glider_dist.errors import GliderError

if TYPE_CHECKING:
    from glider_dist.cli import Arguments

USAGE = """usage: glider-dist bench layer|forward|arrow|checkpoint
       glider-dist bench dispatch|joint [--ranks N]
       glider-dist bench train [startup] [sharded] [mixing] [batches]
       glider-dist bench embeddings [peer=URL] [requests=N]
       deepspeed --num_gpus N --module glider_dist bench evaluate|without-gates [CONFIG.yaml] [key=value ...]

layer          a routed layer in one process, against one LoRA, a loop over experts, every expert on every token
forward        forwards and generation of a whole routed model, against its base
dispatch       one exchange between N processes on gloo, by each strategy, forward and backward; tokens=512: only
               the cells with so many tokens a rank
joint          a step of joint training by ZeRO stage and dispatch, against one process and replicated experts
arrow          Arrow here and in PEFT: time and memory at 8, 32 and 128 adapters
train          many experts in one job, against one after another; only the named parts of it
checkpoint     what keeping unfinished experts costs a training step
embeddings     the embedding service against the bare model, and a peer=URL: throughput, cached texts, memory
evaluate       seconds per query of evaluate.routers, and their ratios to the base alone (settings of evaluate)
without-gates  scores of the routers that need no gates, beside random adapters (settings of evaluate)

Each prints a table and writes its numbers into run_dir (default runs/bench).
"""

_STAGES = {"evaluate": "glider_dist.bench.evaluation", "without-gates": "glider_dist.bench.without_gates"}
_ALONE = ("layer", "forward", "arrow", "dispatch", "joint", "train", "checkpoint", "embeddings")


def run(arguments: Arguments) -> int:
    """Raises GliderError for an unknown measurement, and for a word, a key or a flag that it does not take."""
    what, words = arguments.text or "nothing", arguments.words[1:]
    if what not in (*_ALONE, *_STAGES):
        raise GliderError(f"bench knows {', '.join([*_ALONE, *_STAGES])}, not {what!r}")
    if words and what != "train":
        raise GliderError(f"bench {what} takes no more words, not {words[0]!r}")
    if arguments.ranks and what not in ("dispatch", "joint"):
        raise GliderError(f"--ranks belongs to bench dispatch and bench joint, not to bench {what}")
    ranks = arguments.ranks or 2
    if ranks == 1:
        raise GliderError(f"bench {what} compares ranks, and one has nothing to exchange; add --ranks 2")
    if what in _STAGES:
        from glider_dist.cli import run_stage
        from glider_dist.settings import read_config

        cfg = read_config(arguments.file, arguments.overrides, {})
        run_stage("bench", cfg, importlib.import_module(_STAGES[what]).run)
        return 0
    if arguments.file is not None:
        raise GliderError(f"bench {what} takes no configuration file ({arguments.file})")
    from glider_dist.bench import arrow, checkpoint, dispatch, embeddings, forward, joint, layer, train

    if what == "dispatch":
        folder, more = _folder_and(arguments, "tokens")
        dispatch.run(folder, ranks, more.get("tokens"))
    elif what == "joint":
        joint.run(_folder(arguments), ranks)
    elif what == "embeddings":
        folder, more = _folder_and(arguments, "peer", "requests")
        requests = more.get("requests", "2000")
        if not requests.isdigit() or int(requests) < 2:
            raise GliderError(f"requests needs a number from 2 on, not {requests!r}")
        embeddings.run(folder, more.get("peer"), requests=int(requests))
    elif what == "train":
        train.run(_folder(arguments), words)
    else:
        {"layer": layer, "forward": forward, "arrow": arrow, "checkpoint": checkpoint}[what].run(
            _folder(arguments)
        )
    return 0


def _folder(arguments: Arguments) -> Path:
    return _folder_and(arguments)[0]


def _folder_and(arguments: Arguments, *others: str) -> tuple[Path, dict[str, str]]:
    """The run directory, and the values of other keys that are given."""
    found = dict(override.split("=", 1) for override in arguments.overrides)
    if unknown := [key for key in found if key not in ("run_dir", *others)]:
        known = ", ".join(f"{key}=" for key in ("run_dir", *others))
        raise GliderError(f"this measurement takes {known}, not {unknown[0]}=")
    return Path(found.pop("run_dir", "runs/bench")), found
