"""What an evaluation or a calibration has found so far, kept for the start after one that ended early."""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from glider_dist.errors import GliderError
from glider_dist.parallel.ranks import Ranks
from glider_dist.pool.files import read_json, write_json

log = logging.getLogger(__name__)


class PartialRow:
    """One router's answers and chosen choices so far. All ranks make it together.

    Args:
        key: what those of earlier starts must have been given for.

    Attributes:
        texts: answers of earlier starts, by position of the query.
        choices: positions of the likeliest choices that earlier starts found, by position of the query.
        tokens: tokens per expert ``[E]`` that these took, on all ranks together; zeros if there are none.
        seconds: that earlier starts spent on the answers.
    """

    def __init__(self, folder: Path, kind: str, key: str, ranks: Ranks, experts: int, minutes: float):
        self._folder, self._kind, self._ranks = folder, kind, ranks
        self._key = key
        # Of this start alone: files of earlier ones stay as they are.
        self._path = folder / f"{kind}.{ranks.rank}.{secrets.token_hex(4)}.json"
        self._interval = 60 * minutes
        self._started = self._last = time.monotonic()
        self._spent = 0.0
        self._new_texts: dict[int, str] = {}
        self._new_choices: dict[int, int] = {}
        found = ranks.gather(self._read(experts) if ranks.is_main else None)[0]
        assert found is not None
        self.texts, self.choices, self.tokens, self.seconds = found
        if self.texts and ranks.is_main:
            log.info("%s: %d answers are there from an earlier start", kind, len(self.texts))

    def _read(self, experts: int) -> tuple[dict[int, str], dict[int, int], torch.Tensor, float]:
        known: dict[int, str] = {}
        choices: dict[int, int] = {}
        seconds = 0.0
        tokens = torch.zeros(experts, dtype=torch.int64)
        for path in sorted(self._folder.glob(f"{self._kind}.*.json")):
            try:
                value = read_json(path)
                if value.get("key") == self._key:
                    texts = {int(place): str(text) for place, text in value["texts"].items()}
                    chosen = {int(place): int(choice) for place, choice in value.get("choices", {}).items()}
                    tokens += torch.tensor(value["tokens"], dtype=torch.int64)
                    known |= texts
                    choices |= chosen
                    # Ranks work at the same time, starts one after the other.
                    seconds += value["seconds"] if value["rank"] == 0 else 0.0
            except (GliderError, AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
                log.warning("%s is damaged (%s); its answers are asked for again", path, error)
        return known, choices, tokens, seconds

    def answered(self, texts: Mapping[int, str], tokens: torch.Tensor) -> None:
        """Note the answers of a batch, by position of the query, and this rank's tokens per expert ``[E]`` up to
        now; written if it is time."""
        self._new_texts.update(texts)
        self._spent = time.monotonic() - self._started
        self._note(tokens)

    def chose(self, choices: Mapping[int, int], tokens: torch.Tensor) -> None:
        """The same for the choices of a batch."""
        self._new_choices.update(choices)
        self._note(tokens)

    def _note(self, tokens: torch.Tensor) -> None:
        self._tokens = tokens
        if time.monotonic() - self._last >= self._interval:
            self.save()

    def save(self) -> None:
        """Write what was noted."""
        if self._new_texts or self._new_choices:
            spent = {"rank": self._ranks.rank, "seconds": round(self._spent, 3)}
            new = {"texts": self._new_texts, "choices": self._new_choices}
            write_json(self._path, {"key": self._key, **spent, "tokens": self._tokens.tolist(), **new})
        self._last = time.monotonic()

    def remove(self) -> None:
        """Delete the files of all ranks and starts: the row is done."""
        for path in self._folder.glob(f"{self._kind}.*.json"):
            path.unlink(missing_ok=True)


class PartialLosses:
    """The losses of a calibration at each α so far. All ranks make it together.

    Attributes:
        nll: ``{α: [N]}`` fp64 nats per token of each query; the same on all ranks.
    """

    def __init__(self, path: Path, key: str, ranks: Ranks):
        self._path, self._key, self._ranks = path, key, ranks
        self.nll: dict[float, np.ndarray] = ranks.gather(self._read() if ranks.is_main else None)[0] or {}

    def _read(self) -> dict[float, np.ndarray]:
        try:
            value = read_json(self._path) if self._path.exists() else {}
            rows = value["nll"].items() if value.get("key") == self._key else ()
            return {float(alpha): np.array(row, dtype=np.float64) for alpha, row in rows}
        except (GliderError, AttributeError, KeyError, TypeError, ValueError) as error:
            log.warning("%s is damaged (%s); its losses are computed again", self._path, error)
            return {}

    def add(self, alpha: float, nll_N: np.ndarray) -> None:
        """Keep the losses at an α, which all ranks have."""
        self.nll[alpha] = nll_N
        plain = {str(known): row.tolist() for known, row in self.nll.items()}
        self._ranks.on_main(lambda: write_json(self._path, {"key": self._key, "nll": plain}))

    def remove(self) -> None:
        """Delete the file: the calibration is done."""
        self._path.unlink(missing_ok=True)
