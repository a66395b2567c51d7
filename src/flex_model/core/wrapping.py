"""What makes the wrapper look like the wrapped model: signature and state_dict keys; and the check of given sizes."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from flex_model.core.groups import ALL
from flex_model.errors import MeshError

if TYPE_CHECKING:
    from flex_model.core.runtime import Runtime

__all__ = ["check_sizes", "largest_mesh", "plain_keys", "with_signature_of", "wrapped_keys"]


def with_signature_of(module: nn.Module, wrapper: type[nn.Module]) -> type[nn.Module]:
    """The wrapper's class with the wrapped model's signature, so that trainers keep the right dataset columns."""
    forward = _forward(module)
    return type(wrapper.__name__, (wrapper,), {"forward": forward, "__module__": wrapper.__module__})


def _forward(module: nn.Module) -> Callable[..., Any]:

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self._forward(*args, **kwargs)

    forward.__doc__ = "The wrapped model's forward; ``groups`` and ``complement`` choose the hooks of this one call."
    try:
        inner = inspect.signature(module.forward)
    except (TypeError, ValueError):
        return forward
    names = inner.parameters
    own = [
        inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY, default=d)
        for n, d in (("groups", ALL), ("complement", False))
        if n not in names
    ]
    parameters = list(names.values())
    tail = [p for p in parameters if p.kind is p.VAR_KEYWORD]
    head = [p for p in parameters if p.kind is not p.VAR_KEYWORD]
    first = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    head = [p.replace(kind=p.POSITIONAL_OR_KEYWORD) if p.kind is p.POSITIONAL_ONLY else p for p in head]
    forward.__signature__ = inner.replace(parameters=[first, *head, *own, *tail])  # type: ignore[attr-defined]
    return forward


def plain_keys(module: Any, state: dict[str, Any], prefix: str, _: Any) -> dict[str, Any]:
    """state_dict hook: the plain model's keys, without ``module.`` and what engines add."""
    module._runtime.notice()
    inner = f"{prefix}module."
    for key in [k for k in state if k.startswith(inner)]:
        state[prefix + module._runtime.names.plain_key(key[len(inner) :])] = state.pop(key)
    return state


def wrapped_keys(module: Any, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """load_state_dict hook: the inverse."""
    module._runtime.notice()
    own = f"{prefix}trainable_modules."
    for key in [k for k in state if k.startswith(prefix) and not k.startswith(own)]:
        state[f"{prefix}module.{module._runtime.names.wrapped_key(key[len(prefix) :])}"] = state.pop(key)


def largest_mesh(module: nn.Module) -> DeviceMesh | None:
    meshes = [p.device_mesh for p in module.parameters() if isinstance(p, DTensor)]
    return max(meshes, key=lambda m: m.ndim, default=None)


def check_sizes(
    runtime: Runtime,
    tensor: int | None,
    pipeline: int | None,
    data: int | None,
    group: dist.ProcessGroup | None,
) -> None:
    found = {"tensor": 1, "data": 1, "stage": 1}
    for axis in runtime.whole.axes:
        found[axis.kind] *= 1 if axis.sequence else axis.size
    for name, given, kind in (
        ("tensor_parallel_size", tensor, "tensor"),
        ("data_parallel_size", data, "data"),
        ("pipeline_parallel_size", pipeline, "stage"),
    ):
        if given is not None and given != found[kind]:
            engines = ", ".join(runtime.engines.names) or "none"
            raise MeshError(
                f"{name}={given} was given, but the model has {found[kind]} "
                f"(engines found: {engines}; {runtime.whole}); leave it out or correct it"
                f"{', or make the PipelineStage before FlexModel' if kind == 'stage' else ''}."
            )
    if group is not None and runtime.whole.axes:
        ranks = dist.get_process_group_ranks(group)
        if sorted(ranks) != sorted(runtime.whole.ranks):
            raise MeshError(f"process_group has the ranks {ranks}, but the model is on {runtime.whole.ranks}.")
