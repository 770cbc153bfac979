"""What makes the host wait for a GPU, seen in the operations that run on a CPU."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

_LIBRARIES = ("glider_dist", "transformers", "deepspeed")


def who() -> str:
    """``module.function`` of the innermost frame of a library that this project has a say in, or of the test."""
    frame = sys._getframe(1)
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if module.split(".")[0] in _LIBRARIES:
            return f"{module}.{frame.f_code.co_name}"
        frame = frame.f_back  # type: ignore[assignment]
    return "test"


def wait_of(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str | None:
    """The name of an operation whose result, or the size of whose result, the host has to read; else None."""
    name: str = func.overloadpacket.__name__
    sized = name == "repeat_interleave" and kwargs.get("output_size") is None
    known = name in ("_local_scalar_dense", "nonzero", "masked_select", "bincount", "equal", "is_nonzero")
    masks = name in ("index", "index_put", "index_put_") and any(
        index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
    )
    if known or sized or masks or "unique" in name:
        return f"{name} of a mask" if masks else name
    return None


class Waits(TorchFunctionMode):
    """Counts what would make the host wait for a GPU, by name."""

    METHODS = ("item", "tolist", "cpu", "__bool__", "__int__", "__float__", "__index__")

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, int] = {}
        self.allowed = False
        self.ops = _Ops(self)

    def note(self, name: str) -> None:
        if not self.allowed:
            self.seen[name] = self.seen.get(name, 0) + 1

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in self.METHODS:
            self.note(name)
        return func(*args, **(kwargs or {}))

    def __enter__(self) -> Any:
        self.ops.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.ops.__exit__(*error)


class _Ops(TorchDispatchMode):
    def __init__(self, waits: Waits) -> None:
        super().__init__()
        self.waits = waits

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if (name := wait_of(func, args, kwargs or {})) is not None:
            self.waits.note(name)
        return func(*args, **(kwargs or {}))
