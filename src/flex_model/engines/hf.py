"""transformers' ``DistributedConfig``: plans by module name, a mesh on the model, replaced forwards.

Parameters are DTensors and the data axes are FSDP2's, so this file only adds what transformers alone knows.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterable
from typing import Any, ClassVar

import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Partial

from flex_model.engines.engine import Engine, GradientSite, Held
from flex_model.layout.mesh import Axis

__all__ = ["TransformersEngine"]


class TransformersEngine(Engine):
    """A transformers model that was loaded with a ``distributed_config``."""

    name: ClassVar[str] = "transformers"

    @classmethod
    def find(cls, module: nn.Module) -> TransformersEngine | None:
        if "transformers" not in sys.modules:
            return None
        mesh = getattr(module, "_device_mesh", None)
        return cls(module) if isinstance(mesh, DeviceMesh) else None

    @property
    def meshes(self) -> list[DeviceMesh]:
        return [self.module._device_mesh]  # type: ignore[list-item]

    no_backward: ClassVar[str] = "transformers' pipelines send activations forward and no gradients back"

    @property
    def axes(self) -> list[Axis]:
        # its DTensor parameters and FSDP2 modules carry all others
        stage = getattr(self.module, "_pp_stage", None)
        if stage is None or stage.pp_size == 1:
            return []
        return [Axis("pp", "stage", tuple(dist.get_process_group_ranks(stage.pp_group)))]

    def absent(self, module: nn.Module) -> bool:
        return type(module).__name__ == "PipelineIdentityLayer"

    def stage_inputs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Later stages get hidden states in the place of token ids."""
        stage = getattr(self.module, "_pp_stage", None)
        if stage is None or stage.pp_is_first_stage:
            return args, kwargs
        bound = inspect.signature(type(self.module).forward).bind_partial(self.module, *args, **kwargs)
        named = {**bound.arguments, **bound.arguments.get("kwargs", {})}
        named.pop("self")
        named.pop("kwargs", None)
        ids = named.pop("input_ids", None)
        if ids is not None:
            config: Any = self.module.config
            like = next(self.module.parameters())
            named["inputs_embeds"] = like.new_zeros((*ids.shape[:2], config.hidden_size), device=ids.device)
        return (), named

    @property
    def held(self) -> Iterable[Held]:
        if not self.axes:
            return ()
        base = self.module.get_submodule(str(self.module.base_model_prefix))
        return [Held(base, base, answer=self._nothing)]

    def _nothing(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What a stage hands on of a forward that was stopped: as many hidden states as there are tokens, and NaN."""
        from transformers.modeling_outputs import BaseModelOutputWithPast

        given: Any = kwargs.get("inputs_embeds")
        given = kwargs.get("input_ids", args[0] if args else None) if given is None else given
        width: int = self.module.config.hidden_size  # type: ignore[union-attr,assignment]
        states = next(self.module.parameters()).new_full((*given.shape[:2], width), float("nan"))
        return BaseModelOutputWithPast(last_hidden_state=states, past_key_values=kwargs.get("past_key_values"))

    def gradient_site(self, owner: nn.Module, attribute: str) -> GradientSite | None:
        # transformers sums these gradients itself, after they were accumulated
        return GradientSite("local", {"tensor": Partial("sum")}) if _sums_gradients(owner) else None


def _sums_gradients(module: nn.Module) -> bool:
    """Whether the closure that replaced the module's forward is the style ``replicated_with_grad_allreduce``."""
    forward = module.__dict__.get("forward")
    return "ReplicatedWithGradAllReduce" in getattr(forward, "__qualname__", "")
