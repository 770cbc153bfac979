"""Embeddings that are known already, in memory.

An entry is the number of tokens of a text and its vector, little-endian: ``int32`` and ``float32 [D]``.
"""

from __future__ import annotations

import hashlib
import struct
from collections import OrderedDict

import numpy as np


def text_key(text: str, model: str = "") -> bytes:
    """32 bytes that stand for a text under a model.

    Raises:
        UnicodeEncodeError: the text holds half of a surrogate pair.
    """
    return hashlib.sha256(f"{model}\n{text}".encode()).digest()


def pack(tokens: int, vector: np.ndarray) -> bytes:
    return struct.pack("<i", tokens) + np.ascontiguousarray(vector, dtype="<f4").tobytes()


def tokens_of(entry: bytes) -> int:
    return int(struct.unpack_from("<i", entry)[0])


def vector_of(entry: bytes) -> np.ndarray:
    """``[D]`` fp32, read-only."""
    return np.frombuffer(entry, dtype="<f4", offset=4)


class Recent:
    """The latest entries in memory, ``limit`` of them at most. For one thread."""

    def __init__(self, limit: int):
        self.limit = limit
        self._entries: OrderedDict[bytes, bytes] = OrderedDict()

    def get(self, key: bytes) -> bytes | None:
        entry = self._entries.get(key)
        if entry is not None:
            self._entries.move_to_end(key)
        return entry

    def put(self, key: bytes, entry: bytes) -> None:
        self._entries[key] = entry
        self._entries.move_to_end(key)
        while len(self._entries) > self.limit:
            self._entries.popitem(last=False)
