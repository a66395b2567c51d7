"""Megatron-core's pipeline schedules: chunks of a model on each stage, which get hidden states from an attribute.

A schedule's functions are looked up in its module when they are called, so that is where they are watched, once a
FlexModel exists. Layers count themselves over the whole model, which gives them the plain model's names.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from importlib import import_module
from typing import Any, ClassVar

import torch.distributed as dist
from torch import Tensor, nn

from flex_model.engines.engine import Conductor, Engine
from flex_model.engines.schedule import Conductors, watch
from flex_model.layout.mesh import Axis
from flex_model.trees import first_tensor

__all__ = ["MegatronPipelineEngine"]

_FILE = "megatron.core.pipeline_parallel.schedules"
_conductors = Conductors()
_watched: list[Any] = []
_places: dict[int, tuple[int, int]] = {}  # id of a forward's output: what its backward belongs to


class MegatronPipelineEngine(Engine):
    """The module is a chunk of a model that ``parallel_state`` spreads over stages, or a ``ModuleList`` of them."""

    name: ClassVar[str] = "Megatron-core's pipeline"

    def __init__(self, module: nn.Module, chunks: Sequence[nn.Module], group: Any) -> None:
        super().__init__(module)
        self._group = group
        first = dist.get_rank(group)
        self._parts = {first + i * group.size(): chunk for i, chunk in enumerate(chunks)}

    @classmethod
    def find(cls, module: nn.Module) -> MegatronPipelineEngine | None:
        state: Any = sys.modules.get("megatron.core.parallel_state")
        if state is None or not state.model_parallel_is_initialized():
            return None
        group = state.get_pipeline_model_parallel_group()
        several = isinstance(module, nn.ModuleList)
        chunks = [_chunk(m) for m in (module.children() if several else [module])]
        if group.size() == 1 or not chunks or any(c is None for c in chunks):
            return None
        _watch()
        return cls(module, [c for c in chunks if c is not None], group)

    @property
    def axes(self) -> list[Axis]:
        return [Axis("pp", "stage", tuple(dist.get_process_group_ranks(self._group)))]

    @property
    def parts(self) -> Mapping[int, nn.Module]:
        return self._parts

    @property
    def lockstep(self) -> bool:
        return False  # a chunk called by hand: the others may be called later, or never

    @property
    def renamed(self) -> Mapping[str, str]:
        """Each chunk counts its layers from 0; the layers themselves know better."""
        out = {}
        several = isinstance(self.module, nn.ModuleList)
        for chunk in self._parts.values():
            prefix = next(n for n, m in self.module.named_modules() if m is chunk) if several else ""
            for name, layer in chunk.named_modules(prefix=prefix):
                head, _, last = name.rpartition(".")
                if last.isdigit() and hasattr(layer, "layer_number"):
                    inner = head.removeprefix(prefix).lstrip(".")
                    out[name] = f"{inner}.{layer.layer_number - 1}"
        return out

    def entry(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
        hidden = _hidden(module) if any(module is part for part in self._parts.values()) else None
        if hidden is None:
            return module, args, kwargs
        return _Entry(module), (hidden.transpose(0, 1), *args), kwargs

    def stage_inputs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        config: Any = next(iter(self._parts.values())).config
        if not args or not getattr(config, "sequence_parallel", False) or not args[0].is_floating_point():
            return args, kwargs
        hidden: Tensor = args[0]  # (B, S/tp, H)
        size = config.tensor_model_parallel_size
        return (hidden.new_zeros(hidden.shape[0], hidden.shape[1] * size, *hidden.shape[2:]), *args[1:]), kwargs

    @classmethod
    def listen(cls, conductor: Conductor) -> None:
        _conductors.add(conductor)


class _Entry(nn.Module):
    """A chunk whose hidden states come as its first argument, batch first, instead of by an attribute."""

    def __init__(self, chunk: nn.Module) -> None:
        super().__init__()
        self.chunk = chunk

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        chunk: Any = self.chunk
        before = _hidden(chunk)
        chunk.set_input_tensor(hidden.transpose(0, 1).contiguous())
        try:
            return chunk(*args, **kwargs)
        finally:
            chunk.set_input_tensor(before)


def _chunk(module: nn.Module) -> nn.Module | None:
    """The model chunk itself, inside its wrappers."""
    while not hasattr(type(module), "set_input_tensor"):
        inner = module._modules.get("module")
        if inner is None:
            return None
        module = inner
    return module


def _hidden(chunk: nn.Module) -> Tensor | None:
    """What the stage before has sent."""
    held = getattr(getattr(chunk, "decoder", None), "input_tensor", None)
    return first_tensor(held)


# -- the schedule ----------------------------------------------------------------------------------------------
def _watch() -> None:
    schedules = import_module(_FILE)
    if schedules in _watched:
        return
    _watched.append(schedules)
    for name in (
        "forward_backward_pipelining_without_interleaving",
        "forward_backward_pipelining_with_interleaving",
    ):
        watch(schedules, name, _step)
    watch(schedules, "forward_step", _forward, after=_remember)
    watch(schedules, "backward_step", _backward)


@contextmanager
def _step(*_: Any, model: Any, num_microbatches: int, forward_only: bool = False, **__: Any) -> Iterator[None]:
    chunks = [_chunk(m) for m in (model if isinstance(model, list) else [model])]
    _conductors.look()
    # the loss of a microbatch is divided before its backward
    with _conductors.inside(chunks, lambda c: c.step(num_microbatches, divide=1, backward=not forward_only)):
        try:
            yield
        finally:
            _places.clear()


@contextmanager
def _forward(_: Any, __: Any, model: Any, *args: Any, **kwargs: Any) -> Iterator[tuple[int, int] | None]:
    chunk, microbatch = _chunk(model), kwargs.get("current_microbatch")
    place: list[tuple[int, int]] = []

    def told(conductor: Conductor) -> AbstractContextManager[None]:
        place[:] = [(conductor.stage_of(chunk), int(microbatch or 0))]
        return conductor.forward(*place[0])

    with _conductors.inside([chunk] if microbatch is not None else [], told):
        yield place[0] if place else None


def _remember(place: tuple[int, int] | None, out: Any) -> None:
    first = first_tensor(out[0])
    if place is not None and first is not None:
        _places[id(first)] = place


@contextmanager
def _backward(_: Any, output: Any, *__: Any, **___: Any) -> Iterator[None]:
    first = output[0] if isinstance(output, list) else output
    place = _places.pop(id(first), None)
    with ExitStack() as stack:
        for conductor in _conductors:
            if place is not None:
                stack.enter_context(conductor.backward(*place))
        yield
