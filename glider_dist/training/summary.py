"""What a training stage reports at its end: speed, padding, quantiles over experts, and who stopped early."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from glider_dist.errors import GliderError
from glider_dist.job import Job
from glider_dist.model.quantised import weight_count
from glider_dist.training.runner import Runner
from glider_dist.training.trainee import Trainee

log = logging.getLogger(__name__)


def report(job: Job, kind: str, mine: Sequence[Trainee], runner: Runner, seconds: float) -> None:
    """Gather every rank's results; log, record and check them.

    ``TFLOP/s`` counts 4 operations a token and parameter, a forward and the gradient of the activations: the base
    itself gets no gradient.

    Raises:
        GliderError: on all ranks, if an expert stopped early.
    """
    rows = [
        (t.name, t.progress.losses[-1], t.progress.best_loss, t.progress.tokens, t.progress.stopped) for t in mine
    ]
    parts = job.ranks.gather((rows, runner.tokens, runner.padding, runner.examples, seconds))
    everything = [row for part in parts for row in part[0]]
    tokens, padding = sum(part[1] for part in parts), sum(part[2] for part in parts)
    examples = sum(part[3] for part in parts)
    seconds = max(part[4] for part in parts)
    job.run.quantiles(f"{kind}/final_loss", [row[1] for row in everything])
    job.run.quantiles(f"{kind}/validation_loss", [row[2] for row in everything])
    job.run.quantiles(f"{kind}/tokens", [row[3] for row in everything])
    rate, share = tokens / seconds, padding / max(1, padding + tokens)
    flops = 4 * weight_count(job.frozen.model)
    values = {
        "tokens_per_second": rate,
        "examples_per_second": examples / seconds,
        "padding_share": share,
        "tflops": rate * flops / 1e12,
        "seconds": seconds,
    }
    job.run.log({f"{kind}/{key}": value for key, value in values.items()})
    if job.ranks.is_main:
        log.info(
            "%d %ss in %.0f s, %.0f tokens/s and %.1f examples/s over all ranks, %.1f %% padding, %.3f TFLOP/s",
            len(everything), kind, seconds, rate, examples / seconds, 100 * share, values["tflops"],
        )  # fmt: skip
    if stopped := [f"{row[0]} ({row[4]})" for row in everything if row[4]]:
        raise GliderError(
            f"{len(stopped)} of {len(everything)} {kind}s stopped early: {'; '.join(stopped)}. "
            "The others are done; lower the learning rate, remove these from the pool and run again"
        )
