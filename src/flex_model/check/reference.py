"""The unsharded model: the user's, or one made of the sharded model's own modules and its whole parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from flex_model.core.whole import full_parameter, plain_copy
from flex_model.errors import FlexModelError
from flex_model.routing.collectives import all_gather_objects

if TYPE_CHECKING:
    from flex_model.core.runtime import Runtime

__all__ = ["NoReference", "make_reference"]

# Under these, modules are the plain model's own once their parameters are whole: nothing in them counts on the ranks.
_SIMPLE = {"DDP", "replicate", "FSDP1", "FSDP2", "DTensor", "transformers", "experts"}


class NoReference(FlexModelError, RuntimeError):
    """The unsharded model cannot be had here: told as a row of the report, and so without a page."""


def make_reference(runtime: Runtime, given: nn.Module | Callable[[], nn.Module] | None) -> nn.Module | None:
    """The unsharded model on the main rank, None on the others. Raises NoReference on all ranks. Collective."""
    if given is not None:
        return _on_main(runtime, lambda: given if isinstance(given, nn.Module) else given())
    others = sorted(set(runtime.engines.names) - _SIMPLE)
    if others:
        raise NoReference(f"modules under {', '.join(others)} keep sizes or groups of their own")
    if _over_experts(runtime):
        raise NoReference("under expert parallelism modules count their own experts")
    if not runtime.whole.axes:
        raise NoReference("the model runs on one process as it is: there is nothing to compare it with")
    whole: dict[tuple[int, str], Tensor] = {}
    for name, (owner, attribute) in runtime.names.parameters.items():
        full = _parameter(runtime, name)
        if runtime.whole.is_main:
            whole[id(owner), attribute] = full.to(runtime.device_of_values)
    for module in runtime.root.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                full = buffer.full_tensor() if isinstance(buffer, DTensor) else buffer.detach().clone()
                whole[id(module), name] = full
    return _on_main(runtime, lambda: _made(runtime, whole))


def _over_experts(runtime: Runtime) -> bool:
    config = getattr(runtime.root, "config", None)
    spread = getattr(config, "distributed_config", None)
    return any(e.other_lines for e in runtime.engines.found) or (getattr(spread, "ep_size", 1) or 1) > 1


def _parameter(runtime: Runtime, name: str) -> Tensor:
    owner, attribute = runtime.names.parameters[name]
    try:
        full = full_parameter(runtime, name)
    except FlexModelError as error:
        raise NoReference(f"the parameter {name} has no whole: {error}") from error
    held = owner._parameters.get(attribute)
    if held is not None and held.dtype != full.dtype:
        raise NoReference(f"the parameter {name} is {held.dtype}, quantised")
    return full


def _on_main(runtime: Runtime, make: Callable[[], nn.Module]) -> nn.Module | None:
    """``make`` on the main rank alone; if it fails there, all ranks raise."""
    made, problem = None, ""
    if not runtime.whole.axes or runtime.whole.is_main:
        try:
            made = make()
        except Exception as error:
            problem = f"{type(error).__name__}: {error}"
    if runtime.whole.axes:
        runtime.whole.prepare()
        problem = next(filter(None, all_gather_objects(problem, runtime.whole.world)), "")
    if problem:
        raise NoReference(problem)
    return made


def _made(runtime: Runtime, whole: dict[tuple[int, str], Tensor]) -> nn.Module:
    """A copy without wrappers, hooks and engines, and with whole parameters."""
    plain, memo = plain_copy(runtime, runtime.root, {})
    for (owner, attribute), tensor in whole.items():
        place: Any = memo.get(owner)
        if place is None:
            continue  # of a wrapper's own
        if attribute in place._buffers:
            place._buffers[attribute] = tensor
            continue
        place.__dict__.pop(attribute, None)
        place.register_parameter(attribute, nn.Parameter(tensor, requires_grad=False))
    for name, (module, attribute) in runtime.names.parameters.items():
        memo[id(module)]._parameters[attribute].requires_grad_(runtime.names.requires_grad(name))
    for module in plain.modules():
        module._parameters.pop("_flat_param", None)  # FSDP1's
    for name, tensor in (*plain.named_parameters(), *plain.named_buffers()):
        if tensor.is_meta or isinstance(tensor, DTensor):
            raise NoReference(f"{name} has no value in the copy of the model")
    for part in plain.modules():
        part._compiled_call_impl = None
    return plain
