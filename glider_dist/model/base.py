"""The frozen base model: where it comes from, in which dtype it computes and on which device."""

from __future__ import annotations

import functools
import platform
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from glider_dist.config import OFFLINE_DEFAULT
from glider_dist.errors import GliderError, first_line
from glider_dist.model.cache import weights_hash
from glider_dist.model.download import smollm2_folder
from glider_dist.model.gguf import gguf_folder
from glider_dist.model.quantised import quantisation, use_plain_kernels
from glider_dist.model.zero import loading_in_shards

TOKENIZER_FILES = ("tokenizer*", "*vocab*", "merges.txt", "*.model", "*.spm", "*.tiktoken")


@dataclass(frozen=True)
class BaseModel:
    """A frozen language model in eval mode with its tokenizer.

    ``source`` is the resolved model folder or the hub id; ``reason`` says in one phrase why ``dtype``.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    dtype: torch.dtype
    device: torch.device
    source: str
    reason: str

    @functools.cached_property
    def weights_hash(self) -> str | None:
        """Hex SHA-256 of the safetensors files, see :func:`glider_dist.model.cache.weights_hash`.

        Computed on first use (about 0.2 s for 270 MB) and remembered in the cache. None where the
        weights are no safetensors files or the hub's snapshot folder is unknown.
        """
        folder = Path(self.source)
        if not folder.is_dir():
            config = try_to_load_from_cache(self.source, "config.json")
            if not isinstance(config, str):
                return None
            folder = Path(config).parent
        return weights_hash(folder)


def load_base(
    base: str, dtype: str = "auto", device: str = "auto", bits: int | None = None, sharded: bool = False
) -> BaseModel:
    """Load a causal or encoder-decoder language model, frozen, in eval mode, with its tokenizer.

    The tokenizer has a pad token (the end token where it had none) and pads causal models on the left.

    Args:
        base: ``smollm2-135m``, a model folder, a path to a ``.gguf`` file or a hub id. A hub model that is
            already in the Hugging Face cache is taken from there without asking the hub.
        dtype: ``auto``, ``float32`` or ``bfloat16``; ``auto`` is bfloat16 where the device is fast in it.
        device: ``auto`` (the current CUDA device where there is one), ``cpu``, ``cuda`` or ``cuda:1``.
        bits: 8 or 4 to quantise the linear layers but the head to so many a weight.
        sharded: keep this rank's share of the parameters alone (ZeRO 3). All ranks load together then, and one of
            them has called :func:`prepare_base` before.

    Raises:
        GliderError: the base cannot be found, fetched or read, ``dtype`` is unknown, or the device or the library
            for ``bits`` absent.
    """
    target = _choose_device(device)
    chosen, reason = choose_dtype(dtype, target)
    how = _How(chosen, target, sharded, quantisation(bits, chosen) if bits else None)
    reason += f"; linear layers in {bits} bits" if bits else ""
    source = _resolve(base)
    with loading_in_shards(chosen) if sharded else nullcontext():
        if Path(source).is_dir():
            model, tokenizer = _load(source, how, local_only=True)
        else:
            model, tokenizer = _load_from_hub(source, how)
    model.requires_grad_(False).eval()
    tune(model, target)
    if target.type == "cpu":
        use_plain_kernels(model)
    _set_padding(model, tokenizer, source)
    return BaseModel(model, tokenizer, chosen, target, source, reason)


def tune(model: PreTrainedModel, device: torch.device) -> None:
    """Choose the faster of equal computations for a device."""
    head = model.get_output_embeddings()
    if head is not None:
        # A slice of the hidden states (logits_to_keep) is not contiguous, and torch then multiplies row by row
        # with a copy of the vocabulary matrix for each: half of a training step on a CPU.
        head.register_forward_pre_hook(lambda module, inputs: (inputs[0].contiguous(), *inputs[1:]))
    if device.type == "cpu":
        # The fused attention's backward takes a quarter of a step on short rows; the plain one is negligible.
        model.set_attn_implementation("eager")


def choose_dtype(dtype: str, device: torch.device) -> tuple[torch.dtype, str]:
    """The dtype for ``auto``, ``float32`` or ``bfloat16`` on this device, and why, in one phrase.

    Raises:
        GliderError: ``dtype`` is something else.
    """
    if dtype in ("float32", "bfloat16"):
        return getattr(torch, dtype), f"{dtype}: asked for"
    if dtype != "auto":
        raise GliderError(f"dtype is {dtype!r}, but must be auto, float32 or bfloat16")
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        with torch.cuda.device(device):
            native = torch.cuda.is_bf16_supported(including_emulation=False)
        if native:
            return torch.bfloat16, f"bfloat16: {name} computes in it"
        return torch.float32, f"float32: {name} only emulates bfloat16"
    features = _bfloat16_features()
    if features:
        return torch.bfloat16, f"bfloat16: the processor has {' and '.join(features)}"
    return torch.float32, "float32: the processor has neither avx512_bf16 nor amx_bf16"


def _bfloat16_features() -> list[str]:
    wanted = ("avx512_bf16", "amx_bf16")
    if platform.system() == "Darwin":
        return []
    capabilities = getattr(torch.cpu, "get_capabilities", None)  # not in every supported torch
    if capabilities is not None:
        found = capabilities()
        return [name for name in wanted if found.get(name)]
    try:
        flags = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return []
    return [name for name in wanted if name in flags]


def _choose_device(device: str) -> torch.device:
    try:
        target = torch.device(device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
    except RuntimeError as error:
        raise GliderError(f"device is {device!r}, but must be auto, cpu or cuda") from error
    if target.type == "cpu":
        return target
    if target.type != "cuda":
        raise GliderError(f"device is {device!r}, but must be auto, cpu or cuda")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count <= (target.index or 0):
        raise GliderError(f"device is {device!r}, but torch sees {count} CUDA devices here; pass device=cpu")
    return torch.device("cuda", torch.cuda.current_device() if target.index is None else target.index)


def _resolve(base: str) -> str:
    """Path of a folder that exists and has a config.json, or a hub id, not yet checked."""
    if base == OFFLINE_DEFAULT:
        return str(smollm2_folder())
    path = Path(base).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise GliderError(
                f"{path} has no config.json, so it is no model folder; "
                f"pass base=FOLDER as save_pretrained writes it"
            )
        # transformers makes up an empty tokenizer for some architectures rather than miss the files.
        if not any(file for pattern in TOKENIZER_FILES for file in path.glob(pattern)):
            raise GliderError(f"{path} has no tokenizer files; save the base's tokenizer there too")
        return str(path.resolve())
    if path.suffix == ".gguf":
        if not path.is_file():
            raise GliderError(f"there is no file {path}; pass the path of a .gguf file that exists")
        return str(gguf_folder(path))
    if path.exists():
        raise GliderError(
            f"{path} is neither a model folder nor a .gguf file; pass base=FOLDER, FILE.gguf or a hub id"
        )
    return base


def _load_from_hub(name: str, how: _How) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    if isinstance(_cached_config(name), str):
        try:
            return _load(name, how, local_only=True)
        except GliderError:
            pass  # only a part of it is cached
    _ask_hub(name)
    return _load(name, how, local_only=False)


def prepare_base(base: str) -> None:
    """Convert a base that is no model folder yet, into the cache; what is on the hub is left to :func:`load_base`.

    Raises:
        GliderError: it cannot be found or converted.
    """
    _resolve(base)


def fetch_base(base: str) -> str:
    """Bring a base into the caches without loading it; returns its folder.

    Args:
        base: see :func:`load_base`.

    Raises:
        GliderError: it cannot be found or fetched.
    """
    source = _resolve(base)
    if Path(source).is_dir():
        return source
    _ask_hub(source)
    for weights in ("*.safetensors", "*.bin"):
        try:
            folder = snapshot_download(source, allow_patterns=["*.json", weights, *TOKENIZER_FILES])
        except Exception as error:  # the network's own are of whichever library the hub's client uses
            raise GliderError(
                f"{source!r} broke off while it was fetched ({first_line(error)}); start again, it goes on there"
            ) from error
        if next(Path(folder).glob(weights), None) is not None:
            return folder
    raise GliderError(f"the hub's {source!r} holds no weights in safetensors; pass base=FOLDER")


def _ask_hub(name: str) -> None:
    """Raises GliderError if the hub does not have the model or cannot be asked."""
    try:
        hf_hub_download(name, "config.json")
    except HFValidationError as error:
        raise GliderError(f"there is no folder {name}, and it is no hub id either; pass base=FOLDER") from error
    except LocalEntryNotFoundError as error:
        raise GliderError(
            f"no network and no cached copy of {name!r}; pass base=FOLDER with a model that is already here, "
            f"or base={OFFLINE_DEFAULT}"
        ) from error
    except OSError as error:
        raise GliderError(f"the hub does not give out {name!r} ({first_line(error)}); check the id") from error


def _cached_config(name: str) -> object:
    try:
        return try_to_load_from_cache(name, "config.json")
    except HFValidationError:
        return None


@dataclass(frozen=True)
class _How:
    dtype: torch.dtype
    device: torch.device
    sharded: bool
    quantisation: BitsAndBytesConfig | None


def _load(source: str, how: _How, local_only: bool) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    # On a GPU the weights go there straight from the file, without a copy in each process's memory.
    whole = not how.sharded and (how.device.type == "cuda" or how.quantisation)
    device_map = how.device if whole else None
    quantised = {"quantization_config": how.quantisation} if how.quantisation else {}
    try:
        config = AutoConfig.from_pretrained(source, local_files_only=local_only)
        tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=local_only)
        model = _auto_class(config).from_pretrained(
            source, config=config, dtype=how.dtype, device_map=device_map, local_files_only=local_only, **quantised
        )
    except (OSError, ValueError, KeyError, ImportError, SafetensorError) as error:
        raise GliderError(
            f"cannot load the base {source} ({first_line(error)}); pass base=FOLDER with config.json, "
            f"weights and tokenizer of a causal or encoder-decoder language model"
        ) from error
    return model, tokenizer


def _auto_class(config: Any) -> Any:
    return AutoModelForSeq2SeqLM if getattr(config, "is_encoder_decoder", False) else AutoModelForCausalLM


def on_meta(folder: Path, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The language model of a ``config.json`` on the meta device: every layer and shape, no weights.

    Args:
        folder: or a hub id that is cached.

    Raises:
        OSError, ValueError, KeyError, ImportError: there is none, or it describes no language model.
    """
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    with torch.device("meta"):
        model: PreTrainedModel = _auto_class(config).from_config(config, dtype=dtype)
    return model


def _set_padding(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, source: str) -> None:
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise GliderError(
                f"the tokenizer of {source} has neither a pad nor an end token; "
                f"set one in its tokenizer_config.json"
            )
        tokenizer.pad_token = tokenizer.eos_token
    for config in (model.config, model.generation_config):
        if config is not None and getattr(config, "pad_token_id", None) is None:
            config.pad_token_id = tokenizer.pad_token_id
    if not model.config.is_encoder_decoder:
        tokenizer.padding_side = "left"
