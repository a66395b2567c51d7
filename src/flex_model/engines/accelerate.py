"""accelerate's ``device_map``: modules whose weights lie elsewhere until they run. Activations need nothing."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import ClassVar

import torch
from torch import Tensor, nn

from flex_model.engines.engine import Engine, GradientSite, Held

__all__ = ["AccelerateEngine"]


class AccelerateEngine(Engine):
    """Some module has a hook of accelerate's."""

    name: ClassVar[str] = "accelerate"
    distributed: ClassVar[bool] = False

    @classmethod
    def find(cls, module: nn.Module) -> AccelerateEngine | None:
        if "accelerate" not in sys.modules:
            return None
        return cls(module) if any(hasattr(m, "_hf_hook") for m in module.modules()) else None

    def devices(self) -> set[torch.device]:
        hooks = [h for m in self.module.modules() if (h := getattr(m, "_hf_hook", None)) is not None]
        flat = [h for hook in hooks for h in getattr(hook, "hooks", (hook,))]
        found = {d for h in flat if (d := getattr(h, "execution_device", None)) is not None}
        return {torch.device("cuda", d) if isinstance(d, int) else torch.device(d) for d in found}

    @property
    def held(self) -> Iterable[Held]:
        return [Held(m, m, "_old_forward") for m in self.module.modules() if hasattr(m, "_old_forward")]

    def gradient_site(self, owner: nn.Module, attribute: str) -> GradientSite | None:
        parameter = owner._parameters.get(attribute)
        if parameter is None or not parameter.is_meta:
            return None
        return GradientSite(
            "never", refusal="it is offloaded, and each forward makes a weight of its own; keep it on a device"
        )

    def full_parameter(self, owner: nn.Module, attribute: str) -> Tensor | None:
        parameter = owner._parameters.get(attribute)
        if parameter is None or not parameter.is_meta:
            return None
        from accelerate.utils import align_module_device

        with align_module_device(owner):
            return owner.get_parameter(attribute).detach().clone()
