"""Run real code on meta tensors and count what it would allocate and compute.

No formula stands here: memory is the storages that are alive at once, operation by operation, as the same code
would allocate them on a device; floating-point operations are those of torch's own table per operation.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from torch.utils.weak import WeakIdKeyDictionary

_aten: Any = torch.ops.aten
_NO_KERNELS = {"_unsafe_view", "empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided"}


class Trace(TorchDispatchMode):
    """Counts the storages made inside, which must be meta or CPU tensors.

    Meta tensors have no values. Where code asks for one, the answer is the one that costs most: every mask is all
    true (no padding), and nothing is exceptional (``any`` of a mask is false).

    Args:
        known: tensors whose storages are there already and are not counted.

    Attributes:
        peak: bytes that were alive at once at most, of those made inside.
        live: bytes that are alive now.
        kept: bytes that were alive at :meth:`keep`.
        flops: floating-point operations of matrix products and attention; a multiply-add is two.
        kernels: operations that a GPU would launch: all but views and memory that is not filled.
    """

    def __init__(self, known: Iterable[torch.Tensor] = ()):
        super().__init__()
        self.peak = self.live = self.kept = self.flops = self.kernels = 0
        # Held, so that no new storage takes the place of a known one.
        self._known = {storage._cdata: storage for storage in (tensor.untyped_storage() for tensor in known)}
        self._alive: dict[int, weakref.ref[Any]] = {}
        self._exceptions = WeakIdKeyDictionary()

    def keep(self) -> None:
        """Note what is alive now."""
        self.kept = self.live

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        answer = self._value(func, args)
        if answer is not None:
            return answer
        if func is _aten.index.Tensor:
            args = (args[0], [position for index in args[1] for position in _positions(index)])
        out = func(*args, **kwargs)
        if func is _aten.any.default:
            self._exceptions[out] = True
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._see(tensor)
        self.kernels += not (func.is_view or func._overloadpacket.__name__ in _NO_KERNELS)
        count = flop_registry.get(func._overloadpacket)
        if count is not None:
            self.flops += int(count(*args, **kwargs, out_val=out))
        return out

    def _value(self, func: Any, args: Any) -> Any:
        if not args or not isinstance(args[0], torch.Tensor) or args[0].device.type != "meta":
            return None
        if func is _aten._local_scalar_dense.default and args[0].dtype == torch.bool:
            return args[0] not in self._exceptions
        if func is _aten.nonzero.default:
            found = torch.empty(args[0].numel(), args[0].ndim, dtype=torch.int64, device="meta")
            self._see(found)
            return found
        return None

    def _see(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known or key in self._alive:
            return
        self.live += size
        self.peak = max(self.peak, self.live)

        def gone(_: Any) -> None:
            self.live -= size
            del self._alive[key]

        self._alive[key] = weakref.ref(storage, gone)


def _positions(index: torch.Tensor | None) -> list[torch.Tensor | None]:
    """A mask as the positions where it is true, for each of its dimensions."""
    if index is None or index.dtype != torch.bool or index.device.type != "meta":
        return [index]
    return [torch.empty(index.numel(), dtype=torch.int64, device="meta") for _ in range(index.ndim)]


@contextlib.contextmanager
def fused_attention() -> Iterator[None]:
    """On meta tensors, compute attention by the kernel that a GPU would use.

    torch chooses the plain formula for them, which keeps ``[B, heads, S, S]``; flash and memory-efficient kernels
    keep one number per row of it. (Not a TorchFunctionMode: those are off in a backward, which recomputes.)
    """
    plain = F.scaled_dot_product_attention

    def chosen(query: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return (_fused if query.device.type == "meta" else plain)(query, *args, **kwargs)

    F.scaled_dot_product_attention = chosen
    try:
        yield
    finally:
        F.scaled_dot_product_attention = plain


def _fused(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    if enable_gqa:
        repeats = query.shape[1] // key.shape[1]
        key, value = (tensor.repeat_interleave(repeats, 1) for tensor in (key, value))
    keeps = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (query, key, value))
    attention = _aten._scaled_dot_product_efficient_attention
    out: torch.Tensor = attention(query, key, value, attn_mask, keeps, dropout_p, is_causal, scale=scale)[0]
    return out
