"""A device that is not the CPU, for machines without one.

Its tensors lie in the CPU's memory, but nothing may mix them with the CPU's, and whatever would make the host wait
for a GPU is counted. So the code that a GPU would run, runs: the branches for other devices, the copies there and
back, and the exchanges (over gloo, which gets the memory itself). It says nothing about a GPU's kernels or speed.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from host_waits import wait_of, who
from torch.overrides import TorchFunctionMode
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

NAME = "standin"


class _Backend(backend_registration._DummyBackendModule):
    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]


backend_registration._setup_privateuseone_for_python_backend(NAME, backend_module=_Backend())
DEVICE = torch.device(NAME, 0)
CPU = torch.device("cpu")


class Far(torch.Tensor):
    """A tensor on the stand-in; ``memory`` holds its numbers."""

    memory: torch.Tensor

    @staticmethod
    def __new__(cls, memory: torch.Tensor) -> Far:
        made: Far = torch.Tensor._make_wrapper_subclass(
            cls,
            memory.size(),
            strides=memory.stride(),
            storage_offset=memory.storage_offset(),
            dtype=memory.dtype,
            layout=memory.layout,
            device=DEVICE,
        )
        made.memory = memory
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(f"{func} on the stand-in device outside `with stand_in()`")


class StandIn(TorchDispatchMode):
    """Computes for the stand-in.

    Attributes:
        waits: how often the host would have waited for the device, by the function of a library that made it.
        kernels: how many a GPU would have launched, likewise.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()
        self.kernels: Counter[str] = Counter()

    def clear(self) -> None:
        self.waits.clear()
        self.kernels.clear()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = func.overloadpacket.__name__
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        far = [tensor for tensor in tensors if isinstance(tensor, Far)]
        onto = None if kwargs.get("device") is None else torch.device(kwargs["device"])
        if onto is not None:
            kwargs["device"] = CPU if onto.type == NAME else onto
        moves = name in ("_to_copy", "copy_")
        # A number may come from anywhere, as with CUDA.
        if far and not moves and any(tensor.ndim and not isinstance(tensor, Far) for tensor in tensors):
            shapes = ", ".join(f"{list(tensor.shape)} on {tensor.device}" for tensor in tensors)
            raise RuntimeError(f"{func}: tensors of two devices ({shapes})")
        if name == "copy_":
            there = isinstance(args[0], Far)
        else:
            there = onto.type == NAME if onto is not None else bool(far)
        if far and (not there if moves else wait_of(func, args, kwargs)):
            self.waits[who()] += 1
        if (far or there) and not func.is_view and name != "_unsafe_view":
            self.kernels[who()] += 1
        result = func(*tree_map(_memory, args), **tree_map(_memory, kwargs))
        if not there:
            return result
        # What works in place gives back its argument.
        known = {id(tensor.memory): tensor for tensor in far}
        return tree_map(lambda leaf: _on_the_stand_in(leaf, known), result)


class _Literals(TorchFunctionMode):
    """What PyTorch does beneath its dispatcher: numbers of the host to a device, and a device's to a list."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in (torch.tensor, torch.as_tensor) and torch.device(kwargs.get("device") or CPU).type == NAME:
            return func(*args, **{**kwargs, "device": CPU}).to(DEVICE)
        if func is torch.Tensor.tolist and isinstance(args[0], Far):
            return args[0].cpu().tolist()
        if func in (torch.Tensor.__getitem__, torch.Tensor.__setitem__) and isinstance(args[0], Far):
            index = torch.tensor(args[1]).to(DEVICE) if isinstance(args[1], list) else args[1]
            args = (args[0], index, *args[2:])
        return func(*args, **kwargs)


@contextlib.contextmanager
def stand_in() -> Iterator[StandIn]:
    """Inside, :data:`DEVICE` can be computed on."""
    with _Literals(), StandIn() as mode:
        yield mode


def _memory(leaf: Any) -> Any:
    return leaf.memory if isinstance(leaf, Far) else leaf


def _on_the_stand_in(leaf: Any, known: dict[int, Far]) -> Any:
    if not isinstance(leaf, torch.Tensor):
        return leaf
    return known[id(leaf)] if id(leaf) in known else Far(leaf)
