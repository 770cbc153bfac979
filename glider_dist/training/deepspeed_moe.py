"""All that this package knows of DeepSpeed's internals for experts. ``tests/test_deepspeed_assumptions.py`` checks
each of the statements below and fails with a sentence where a new DeepSpeed breaks it.

* An expert parameter is one with ``allreduce = False`` and a ``group_name``; its gradients are then summed over
  the ranks that hold the same experts, and divided by the number of all ranks.
* That holds only if some module is an instance of ``MoE`` (ZeRO 0 to 2) or ``AutoEPMoELayer`` (ZeRO 3); an empty
  one will do. Groups are made in its ``set_deepspeed_parallelism``, consecutive ranks sharing a copy of the pool.
* ZeRO 3 also wants the family and the group by which an expert parameter is sharded.
* Marked parameters that are not recognised are overwritten with those of rank 0 without a word, so the engine
  compares what went in with what came out.
* Buckets are filled in the order in which gradients arrive, and are summed across ranks by position. All
  parameters therefore enter the graph through one node, which hands out all gradients at once, zeros included, in
  the same order on every rank, whatever the routers and the dispatch did there.
"""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from glider_dist.errors import GliderError
from glider_dist.model.zero import import_deepspeed

MOMENTS = ("exp_avg", "exp_avg_sq")
"""AdamW's state of a parameter, besides its step."""


class _Enter(torch.autograd.Function):
    """All parameters into the graph; see the module."""

    @staticmethod
    def forward(ctx: Any, *parameters: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(parameter.detach() for parameter in parameters)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return grads


class _Held(nn.Module):
    """Named parameters; its forward returns their values (under ZeRO 3, the hooks around it gather them)."""

    def hold(self, tensors: Mapping[str, torch.Tensor]) -> _Held:
        self.keys = tuple(tensors)
        self.held = nn.ParameterList(nn.Parameter(tensor.clone()) for tensor in tensors.values())
        return self

    def forward(self) -> dict[str, torch.Tensor]:
        return dict(zip(self.keys, _Enter.apply(*self.held), strict=True))

    def named(self) -> dict[str, nn.Parameter]:
        return dict(zip(self.keys, self.held, strict=True))


def _experts(tensors: Mapping[str, torch.Tensor], expert_parallel: int, zero_stage: int) -> _Held:
    """Expert parameters, marked as such; without expert parallelism they are parameters like any other."""
    if expert_parallel == 1:
        return _Held().hold(tensors)
    from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
    from deepspeed.moe.layer import MoE
    from deepspeed.utils import groups

    group = f"ep_size_{expert_parallel}"

    class Experts(_Held, AutoEPMoELayer if zero_stage == 3 else MoE):  # type: ignore[misc]
        def __init__(self) -> None:
            nn.Module.__init__(self)
            self.num_experts = self.ep_size = expert_parallel
            self.num_local_experts = 1
            self.expert_group_name = self.ep_group_name = group

        def set_deepspeed_parallelism(self, *_: Any, **__: Any) -> None:
            if group not in groups._get_expert_parallel_group_dict():
                groups._create_expert_and_data_parallel(expert_parallel)

    module = Experts()
    module.hold(tensors)
    for parameter in module.held:
        parameter.allreduce = False
        parameter.group_name = group
        if zero_stage == 3:
            parameter.ds_zero_placement_family = "autoep_expert"
            parameter.ds_zero_partition_group_name = group
    return module


class _Parameters(nn.Module):
    """What trains: the parts that there are."""

    def __init__(self, **parts: _Held | None):
        super().__init__()
        for name, part in parts.items():
            if part is not None:
                self.add_module(name, part)

    def parts(self) -> dict[str, _Held]:
        return {name: part for name, part in self.named_children() if isinstance(part, _Held)}

    def forward(self) -> dict[str, torch.Tensor]:
        return {key: value for part in self.parts().values() for key, value in part().items()}


class ExpertEngine:
    """Experts and gates in a DeepSpeed engine, without the base.

    Args:
        experts: this rank's experts, by name, any shapes, none of them empty; ranks of an expert-parallel group
            have different ones, replicas the same.
        gates: the same on all ranks.
        expert_parallel: ranks that share one copy of the experts; consecutive ranks form such a group.
        config: as for ``deepspeed.initialize``; its optimizer is AdamW.

    Raises:
        GliderError: DeepSpeed has changed a parameter while it took it over.
    """

    def __init__(
        self,
        experts: Mapping[str, torch.Tensor],
        gates: Mapping[str, torch.Tensor],
        expert_parallel: int,
        config: dict[str, Any],
    ):
        deepspeed = import_deepspeed()
        deepspeed.init_distributed(dist.get_backend(), verbose=False)
        self.zero_stage = int(config["zero_optimization"]["stage"])
        self.expert_parallel = expert_parallel
        module = _Parameters(
            experts=_experts(experts, expert_parallel, self.zero_stage) if experts else None,
            gates=_Held().hold(gates) if gates else None,
        )
        self.kind_of = {key: name for name, part in module.parts().items() for key in part.keys}
        # Any: DeepSpeed hangs attributes of its own on them.
        self._named: dict[str, Any] = {
            key: p for part in module.parts().values() for key, p in part.named().items()
        }
        groups = [{"name": name, "kind": name, "params": list(part.held)} for name, part in module.parts().items()]
        # It prints a memory report and a table of groups.
        with contextlib.redirect_stdout(io.StringIO()):
            self.engine, *_ = deepspeed.initialize(model=module, model_parameters=groups, config=config)
        self._make_state()
        self._check({**experts, **gates})

    def _check(self, given: Mapping[str, torch.Tensor]) -> None:
        for key, tensor in given.items():
            if not torch.equal(self.full(key).cpu(), tensor.cpu()):
                raise GliderError(
                    f"DeepSpeed has changed {key} on rank {dist.get_rank()} while it took it over; this version "
                    "does not know expert parameters as DeepSpeed 0.19.8 does, install that one"
                )

    def values(self) -> dict[str, torch.Tensor]:
        """The present values of all parameters, in the graph where gradients are enabled; a collective under
        ZeRO 3. Call it once for each forward of the model."""
        values = self.engine() if torch.is_grad_enabled() else self.engine.module()
        # Once more for all parts together: a loss that depends on any value then reaches every parameter and every
        # hook of ZeRO 3, which counts them and compares the ranks' counts.
        return dict(zip(values, _Enter.apply(*values.values()), strict=True))

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        """Add the gradients of ``loss``. All ranks call it equally often.

        Args:
            loss: its mean over the ranks is what is minimised.
            last: whether :meth:`step` follows.
        """
        self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(loss, scale_wrt_gas=False)

    def step(self, rates: Mapping[str, float]) -> float:
        """Update by the gradients of the last backwards.

        Args:
            rates: learning rates by kind, ``experts`` and ``gates``.

        Returns:
            The gradient's norm over all experts and gates, before clipping; if it is not finite, nothing was
            updated.
        """
        for group in self.engine.optimizer.param_groups:
            group["lr"] = rates[group["kind"]]
        if self.zero_stage == 0:
            norm = self._plain_norm()
            if math.isfinite(norm):
                self.engine.step()
            return norm
        # It skips the update by itself there.
        self.engine.step()
        return float(self.engine.get_global_grad_norm())

    def _plain_norm(self) -> float:
        """ZeRO 0 computes none: gates are alike on all ranks, experts differ within an expert-parallel group."""
        device = next(iter(self._named.values())).device
        square = {kind: torch.zeros((), dtype=torch.float64, device=device) for kind in self.kind_of.values()}
        for key, parameter in self._named.items():
            square[self.kind_of[key]] += parameter.grad.double().square().sum()
        if self.expert_parallel > 1 and "experts" in square:
            from deepspeed.utils import groups

            group = groups._get_expert_parallel_group(f"ep_size_{self.expert_parallel}")
            dist.all_reduce(square["experts"], group=group)
        return math.sqrt(sum(map(float, square.values())))

    # State: parameters and moments of any stage as whole tensors ------------------------------------------

    def full(self, key: str, moment: str | None = None) -> torch.Tensor:
        """A parameter, or one of its :data:`MOMENTS`, in its own shape; a collective
        among the ranks that hold the same one."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        parameter = self._named[key]
        if self.zero_stage == 0:
            if moment is None:
                return parameter.detach().clone()
            return self.engine.basic_optimizer.state[parameter][moment].clone()
        if moment is None:
            value = safe_get_full_fp32_param(parameter)
        else:
            value = safe_get_full_optimizer_state(parameter, moment)
        return value.detach().reshape(_shape(parameter)).clone()

    def gradient(self, key: str) -> torch.Tensor:
        """A parameter's gradient after the last :meth:`backward` of a step, summed over replicas; a collective
        among the ranks that hold the same one.

        Raises:
            GliderError: it has none.
        """
        from deepspeed.utils import safe_get_full_grad

        parameter = self._named[key]
        grad: torch.Tensor | None = parameter.grad if self.zero_stage == 0 else safe_get_full_grad(parameter)
        if grad is None:
            raise GliderError(
                f"{key} has no gradient at all on rank {dist.get_rank()}; this version of DeepSpeed does not sum "
                "gradients as 0.19.8 does, install that one"
            )
        return grad.detach().reshape(_shape(parameter))

    def set_full(self, key: str, value: torch.Tensor, moment: str | None = None) -> None:
        """Put a whole tensor in place of a parameter or one of its moments."""
        import deepspeed.utils as fragments

        parameter = self._named[key]
        value = value.to(parameter.device, parameter.dtype)
        if self.zero_stage == 3:
            part = _own_part(parameter, value)
            if moment is not None:
                fragments.safe_set_local_optimizer_state(parameter, part, moment)
            else:
                fragments.safe_set_local_fp32_param(parameter, part)
                parameter.ds_tensor.data.copy_(part)
        elif self.zero_stage == 0:
            target = parameter if moment is None else self.engine.basic_optimizer.state[parameter][moment]
            target.data.copy_(value)
        elif moment is not None:
            fragments.safe_set_full_optimizer_state(parameter, value, moment)
        else:
            fragments.safe_set_full_fp32_param(parameter, value)
            # What forwards read is a copy of what the optimizer updates.
            parameter.data.copy_(value)

    @property
    def steps(self) -> int:
        """Updates so far, as AdamW counts them."""
        states = self.engine.basic_optimizer.state.values()
        return max((int(state["step"]) for state in states if "step" in state), default=0)

    @steps.setter
    def steps(self, count: int) -> None:
        for state in self.engine.basic_optimizer.state.values():
            state["step"] = torch.tensor(float(count))

    def _owned(self) -> list[torch.Tensor]:
        """What the optimizer updates on this rank: parameters, or flat parts of their fp32 copies."""
        optimizer = self.engine.optimizer
        if self.zero_stage == 3:
            return list(optimizer.fp32_partitioned_groups_flat)
        if self.zero_stage:
            return list(optimizer.single_partition_of_fp32_groups)
        return list(self._named.values())

    def _make_state(self) -> None:
        """AdamW would make its state in its first step. ZeRO 1 and 2 look for it after that of the first group of
        parameters, and never find the other groups' state."""
        states = self.engine.basic_optimizer.state
        for owned in self._owned():
            states[owned]["step"] = torch.tensor(0.0)
            for moment in MOMENTS:
                states[owned][moment] = torch.zeros_like(owned)
        if self.zero_stage in (1, 2):
            self.engine.optimizer._lazy_init_hp_params_optimizer_state()

    @property
    def local_bytes(self) -> dict[str, int]:
        """Bytes that this rank keeps between steps: parameters as forwards read them, and AdamW's state with the
        master copy if that is another tensor."""
        kept = sum(getattr(p, "ds_tensor", p).nbytes for p in self._named.values())
        states, owned = self.engine.basic_optimizer.state, self._owned()
        moments = sum(value.nbytes for each in owned for value in states.get(each, {}).values() if value.ndim)
        masters = sum(each.nbytes for each in owned) if self.zero_stage else 0
        return {"parameters": kept, "optimizer": moments + masters}


def _shape(parameter: Any) -> torch.Size:
    """Of the whole parameter, also where ZeRO 3 keeps a part."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


def _own_part(parameter: Any, value: torch.Tensor) -> torch.Tensor:
    """The part of a whole tensor that ZeRO 3 keeps on this rank; the last one is filled up with zeros."""
    size, ranks = parameter.ds_tensor.ds_numel, parameter.ds_zero_partition_world_size
    flat = torch.cat([value.flatten(), value.new_zeros(size * ranks - value.numel())])
    return flat[parameter.ds_zero_partition_rank * size :][:size]
