"""Scores of one generated answer against its accepted answers, between 0 and 1."""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Sequence
from typing import Any

from glider_dist.errors import GliderError

_QUOTES = "\"'`“”‘’‚„«»‹› "
_SENTENCE_END = ".,;:!?…。！？"


def normalise(text: str) -> str:
    """Reduce an answer to the form in which exact match compares it.

    Letter case and runs of white space do not count, nor do quotes around the answer or sentence punctuation
    at its end. Everything inside stays (dates, e-mail addresses, decimals), and so do signs and brackets at
    the edges: "-5" is not "5", "(A)" is the label some tasks ask for, and "] )" is a whole answer elsewhere.
    Articles stay too, unlike in SQuAD's script: whether "a" or "the" is right is the question in grammar
    tasks, and dropping them would turn the choice "A" into nothing. An answer of nothing but quotes and
    punctuation is kept as it is, so that "?" and "!" differ.
    """
    collapsed = " ".join(unicodedata.normalize("NFC", text).casefold().split())
    return collapsed.lstrip(_QUOTES).rstrip(_QUOTES + _SENTENCE_END) or collapsed


def exact_match(prediction: str, targets: Sequence[str]) -> float:
    """1.0 if the normalised prediction equals a normalised target, else 0.0.

    Leading white space of the prediction is dropped; then as many lines count as the target has (nearly
    always one), since a model that has answered often goes on with another question.

    Raises:
        GliderError: if there is no target.
    """
    lines = prediction.lstrip().split("\n")
    matches = (
        normalise("\n".join(lines[: target.strip().count("\n") + 1])) == normalise(target)
        for target in _some(targets)
    )
    return float(any(matches))


def rouge_l(prediction: str, targets: Sequence[str]) -> float:
    """ROUGE-L F1 (longest common subsequence of words; Lin, 2004), the best over the targets.

    Words are Porter-stemmed, as in the evaluation of Super-NaturalInstructions. On ASCII text the value is
    that of ``rouge_score`` with ``use_stemmer=True``; letters of other scripts count as letters here, where
    ``rouge_score`` drops them and gives a perfect Greek answer 0.

    Raises:
        GliderError: if there is no target.
    """
    scorer = _rouge()
    return max(float(scorer.score(target, prediction)["rougeL"].fmeasure) for target in _some(targets))


_METRICS = {"exact_match": exact_match, "rouge_l": rouge_l}


def score(metric: str, prediction: str, targets: Sequence[str]) -> float:
    """Score ``prediction`` by the task's metric, ``exact_match`` or ``rouge_l``.

    Raises:
        GliderError: if the metric is unknown or there is no target.
    """
    if metric not in _METRICS:
        raise GliderError(f"metric {metric!r} is unknown; a task's metric must be one of {', '.join(_METRICS)}")
    return _METRICS[metric](prediction, targets)


def _some(targets: Sequence[str]) -> Sequence[str]:
    if isinstance(targets, str) or not targets:
        raise GliderError(f"an answer needs a non-empty list of targets to be scored against, not {targets!r}")
    return targets


@functools.cache
def _rouge() -> Any:
    # Only where it is needed: it loads much of scipy, scikit-learn and pandas.
    from rouge_score import rouge_scorer, tokenizers

    ascii_words = tokenizers.DefaultTokenizer(use_stemmer=True)

    class Words(tokenizers.Tokenizer):
        def tokenize(self, text: str) -> list[str]:
            words = re.findall(r"[^\W_]+", unicodedata.normalize("NFC", text).lower())
            return [stem for word in words for stem in (ascii_words.tokenize(word) if word.isascii() else [word])]

    return rouge_scorer.RougeScorer(["rougeL"], tokenizer=Words())
