"""What a refusal looks like: one sentence, exit code 2."""

from __future__ import annotations

from collections.abc import Callable

from small_jobs import Outcome

Refused = Callable[..., str]
ROUTED = ("train-gates", "evaluate", "predict")
SITE = "model.layers.0.self_attn.q_proj"


def one_sentence(outcome: Outcome) -> str:
    assert outcome.code == 2, outcome
    assert len(outcome.errors) == 1, outcome.err
    assert "Traceback" not in outcome.err
    assert outcome.err.rstrip().splitlines()[-1].endswith(outcome.errors[0])
    return outcome.errors[0]


def says(message: str, *needles: object) -> None:
    missing = [str(needle) for needle in needles if str(needle) not in message]
    assert not missing, f"{message!r} does not name {missing}"
