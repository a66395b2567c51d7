"""torch's context parallelism: each rank holds a part of the sequence, and attention alone talks to the others.

While ``context_parallel`` is active it has parted the buffers it was given, in zig-zag where it balances the load, and
put its own function in the place of ``scaled_dot_product_attention``. Its newer form, ``_ContextParallel`` on attention
modules, does not keep how the buffers were parted: positions among the inputs or ``layout=`` must say it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard

from flex_model.engines.engine import Engine, axes_of_mesh
from flex_model.layout.layout import ZigZag
from flex_model.layout.mesh import Axis
from flex_model.layout.sequence import Order

__all__ = ["ContextParallelEngine"]

_MODULE = "torch.distributed.tensor.experimental._context_parallel._attention"


class ContextParallelEngine(Engine):
    """The context is active, or attention modules of the model were given the style."""

    name: ClassVar[str] = "context parallel"

    def __init__(self, module: nn.Module, mesh: DeviceMesh, order: Order | None) -> None:
        super().__init__(module)
        self._mesh, self._order = mesh, order

    @classmethod
    def find(cls, module: nn.Module) -> ContextParallelEngine | None:
        active = cls.active()
        if active is not None:
            mesh, balanced = active
            return cls(module, mesh, ZigZag if balanced else Shard)
        styled = _attention_modules(module)
        return cls(module, styled[0][1], None) if styled else None

    @staticmethod
    def active() -> tuple[DeviceMesh, bool] | None:
        """The mesh of the context that is open now, and whether it balances the load."""
        torch_cp = sys.modules.get(_MODULE)
        function: Any = F.scaled_dot_product_attention
        if torch_cp is None or function not in torch_cp._replaced_functions:
            return None
        held = dict(zip(function.__code__.co_freevars, function.__closure__, strict=True))
        return held["device_mesh"].cell_contents, torch_cp._cp_options.enable_load_balance

    @property
    def meshes(self) -> list[DeviceMesh]:
        return [self._mesh]

    @property
    def axes(self) -> list[Axis]:
        return [Axis(a.name, "data", a.ranks, sequence=True) for a in axes_of_mesh(self._mesh, "data", "cp")]

    @property
    def sequence_order(self) -> Order | None:
        return self._order

    @contextmanager
    def undisturbed(self) -> Iterator[None]:
        # What is to be seen is which tokens a value's rows follow. Masks go by a token's place on this rank, which
        # inputs of twice the length would upset, so that attention sees the tokens of this rank, and all of them.
        with _local_attention(), _local_modules([m for m, _ in _attention_modules(self.module)]):
            yield

    @contextmanager
    def alone(self) -> Iterator[None]:
        with _local_attention():
            yield

    @contextmanager
    def mimicked(self) -> Iterator[None]:
        with _local_attention():
            yield


def _attention_modules(module: nn.Module) -> list[tuple[nn.Module, DeviceMesh]]:
    """Modules with the style, and the mesh it was given."""
    torch_cp = sys.modules.get(_MODULE)
    if torch_cp is None:
        return []
    hooks: list[tuple[nn.Module, Any]] = [(m, h) for m in module.modules() for h in m._forward_pre_hooks.values()]
    return [(m, h.keywords["mesh"]) for m, h in hooks if _is_style(h)]


def _is_style(hook: Any) -> bool:
    owner = getattr(hook.func, "__self__", None) if isinstance(hook, partial) else None
    return owner is not None and isinstance(owner, sys.modules[_MODULE]._ContextParallel)


def _original() -> Callable[..., Tensor]:
    function: Any = F.scaled_dot_product_attention
    torch_cp = sys.modules.get(_MODULE)
    replaced = {} if torch_cp is None else torch_cp._replaced_functions
    original: Callable[..., Tensor] = replaced[function][1] if function in replaced else function
    return original


@contextmanager
def _local_attention() -> Iterator[None]:
    before, original = F.scaled_dot_product_attention, _original()
    F.scaled_dot_product_attention = partial(_unmasked, original)
    try:
        yield
    finally:
        F.scaled_dot_product_attention = before


@contextmanager
def _local_modules(modules: list[nn.Module]) -> Iterator[None]:
    kept = [(m, dict(m._forward_pre_hooks), m.__dict__.get("forward")) for m in modules]
    original = _original()
    try:
        for module in modules:
            for key in [k for k, h in module._forward_pre_hooks.items() if _is_style(h)]:
                del module._forward_pre_hooks[key]
            module.__dict__["forward"] = partial(_unmasked, original)
        yield
    finally:
        for module, hooks, forward in kept:
            module._forward_pre_hooks.clear()
            module._forward_pre_hooks.update(hooks)
            module.__dict__.pop("forward", None)
            if forward is not None:
                module.__dict__["forward"] = forward


def _unmasked(original: Callable[..., Tensor], query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
    return original(query, key, value, enable_gqa=query.shape[-3] != key.shape[-3])
