"""Experts in training, kept on disk now and then, so that a killed job goes on where it was.

One file per expert, so that a job with another number of ranks can take it up. Weights, moments and counts are all
that there is: the data order follows from seed and name.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from glider_dist.pool.files import write_tensors
from glider_dist.training.adamw import StackedAdamW
from glider_dist.training.slots import Slots
from glider_dist.training.trainee import Progress, Trainee

log = logging.getLogger(__name__)


def training_key(trainee: Trainee, *parts: str) -> str:
    """Hex digest of all that an expert's training depends on: its recipe, its examples and ``parts``."""
    digest = hashlib.sha256(json.dumps([asdict(trainee.recipe), trainee.name, *parts]).encode())
    for item in (*trainee.train, *trainee.validate):
        digest.update(repr((item.prompt, item.answer)).encode())
    return digest.hexdigest()


class Unfinished:
    """The folder of unfinished experts of one kind.

    Attributes:
        keys: by name, :func:`training_key`; a file with another key is of another training and not used.
    """

    def __init__(self, folder: Path, keys: Mapping[str, str], minutes: float):
        self.folder = folder
        self.keys = keys
        self.seconds = 60 * minutes
        self._last = time.monotonic()

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"

    @property
    def due(self) -> bool:
        return time.monotonic() - self._last >= self.seconds

    def save(self, active: Mapping[int, Trainee], slots: Slots, optimizer: StackedAdamW) -> None:
        """Write every expert that is in a slot."""
        for slot, trainee in active.items():
            tensors = {
                "weights": slots.weights[slot],
                "mean": optimizer.mean[slot],
                "square": optimizer.square[slot],
                "updates": optimizer.steps[slot],
            }
            if trainee.best is not None:
                tensors["best"] = trainee.best
            record = {"key": self.keys[trainee.name], "progress": json.dumps(asdict(trainee.progress))}
            write_tensors(self._path(trainee.name), tensors, record)
        self._last = time.monotonic()

    def load(self, slot: int, trainee: Trainee, slots: Slots, optimizer: StackedAdamW) -> None:
        """Go on with an expert that has just entered a slot, if there is a file of this very training."""
        try:
            with safe_open(self._path(trainee.name), "pt") as file:
                record = file.metadata() or {}
                if record.get("key") != self.keys[trainee.name]:
                    return
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
        except FileNotFoundError:
            return
        except SafetensorError as error:
            log.warning("%s cannot be read (%s); its training starts anew", self._path(trainee.name), error)
            return
        with torch.no_grad():
            slots.weights[slot].copy_(tensors["weights"])
            optimizer.mean[slot].copy_(tensors["mean"])
            optimizer.square[slot].copy_(tensors["square"])
            optimizer.steps[slot].copy_(tensors["updates"])
        trainee.resume(Progress(**json.loads(record["progress"])), tensors.get("best"))
        log.info("%s goes on after step %d", trainee.name, trainee.progress.step)

    def remove(self, name: str) -> None:
        """Forget an expert that is done."""
        self._path(name).unlink(missing_ok=True)
