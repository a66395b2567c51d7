"""The meta twin: what shapes would this model's values have if it were not sharded?

A copy of the module's own code with global parameter shapes runs at the real input shape, and at twice the batch where
no probe has told what grows with it.
Floating tensors have no values (meta device); integers keep theirs, because models branch on masks, positions and
lengths. Sizes are proven by this, order never is.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from flex_model.layout.copied import UNCHANGING, copied
from flex_model.layout.layout import shard_dim
from flex_model.layout.meta_mode import IntegersAreReal, nonzero_is_full
from flex_model.layout.moves import Trace, out_of_order
from flex_model.layout.record import Key, Watched, double_batch, recorded, uncollected
from flex_model.layout.values import sharding
from flex_model.trees import copy_tree

__all__ = ["GlobalShapes", "Opaque", "Shapes", "Twin", "TwinShapes", "global_shapes", "stripped"]

T = TypeVar("T")
Shapes = dict[Key, list[tuple[int, ...]]]
_DICTS = (dict, OrderedDict)


@cache
def _is_mesh_state(kind: type) -> bool:
    return issubclass(kind, (dist.ProcessGroup, DeviceMesh))  # isinstance asks Python code of torch's each time


def _ranks(state: dist.ProcessGroup | DeviceMesh) -> tuple[int, ...]:
    group = state.mesh.flatten().tolist() if isinstance(state, DeviceMesh) else dist.get_process_group_ranks(state)
    return tuple(group)


class Opaque(Exception):
    """The twin met a module that nobody knows without the ranks; what it saw before stands."""


@dataclass(frozen=True, slots=True)
class Mimic:
    """How this rank is played without the others: ``prepare`` readies a copy of its size. Not ``exact``: the code may
    fail without the others, and shows nothing then."""

    prepare: Callable[[nn.Module], None] = lambda model: None
    exact: bool = True


class Wholeness(Protocol):
    """What engines know of the model without them."""

    def plain_class(self, module: nn.Module) -> type | None: ...

    def full_shape(self, parameter: Tensor) -> tuple[int, ...] | None: ...

    def stand_ins(self) -> dict[int, object]: ...

    def make_whole(self, twin: nn.Module) -> None: ...

    def alone(self) -> AbstractContextManager[None]: ...

    def mimicked(self) -> AbstractContextManager[Mimic | None]: ...


class _AsItIs:
    """The model with this rank's sizes, and no other ranks to talk to."""

    def __init__(self, engines: Wholeness) -> None:
        self.plain_class = engines.plain_class
        self._lines: dict[int, tuple[int, int]] = {}  # of a mesh by id: ranks along its last axis, and this one's place

    def stand_ins(self) -> dict[int, object]:
        return {}

    def full_shape(self, parameter: Tensor) -> tuple[int, ...]:
        spec = sharding(parameter)
        shape = list(parameter.shape if spec is None else spec.shape)
        dim = None if spec is None else shard_dim(spec.placements[-1])  # those before it are of data axes
        if dim is not None:
            ranks, rank = self._line(spec.mesh)
            most = -(-shape[dim] // ranks)
            shape[dim] = max(0, min(most, shape[dim] - rank * most))
        return tuple(shape)

    def _line(self, mesh: DeviceMesh) -> tuple[int, int]:
        if id(mesh) not in self._lines:
            self._lines[id(mesh)] = mesh.size(-1), mesh.get_local_rank(mesh.ndim - 1)
        return self._lines[id(mesh)]


GlobalShapes = dict[tuple[int, str], tuple[int, ...]]


def global_shapes(model: nn.Module) -> GlobalShapes:
    """{(id of a module, parameter): global shape} while parameters say it: within a forward engines may put local
    tensors in their places."""
    found = ((id(m), n, sharding(p)) for m in model.modules() for n, p in m._parameters.items() if p is not None)
    return {(module, name): tuple(spec.shape) for module, name, spec in found if spec is not None}


@contextmanager
def stripped(
    model: nn.Module,
    engines: Wholeness | _AsItIs,
    kept: Collection[tuple[int, ...]],
    known: GlobalShapes | None = None,
) -> Iterator[dict[int, Any]]:
    """The model without hooks, engine state and replaced forwards, for the time of the copy; yields deepcopy's memo."""
    memo: dict[int, Any] = {}
    saved = []
    modules = list(model.modules())
    try:
        for module in modules:
            attributes = module.__dict__
            before = dict(attributes)
            saved.append((module, before, module.__class__))
            for key, value in before.items():
                kind = type(value)
                if kind in UNCHANGING or (kind in _DICTS and not value):
                    continue  # most attributes there are
                if key.startswith("__composable_api"):
                    del attributes[key]
                elif key.endswith("_hooks") or "_hooks_" in key:
                    attributes[key] = kind() if value is not None else value
                elif _is_mesh_state(kind):  # type: ignore[arg-type]
                    memo[id(value)] = value if kept and _ranks(value) in kept else None
                elif isinstance(value, DTensor):
                    memo[id(value)] = torch.empty(tuple(value.shape), dtype=value.dtype, device="meta")
            attributes.pop("forward", None)
            plain = engines.plain_class(module)
            if plain is not None:
                object.__setattr__(module, "__class__", plain)
        memo.update(engines.stand_ins())
        said = {id(p): known.get((id(m), n)) for m in modules for n, p in m._parameters.items()} if known else {}
        tensors = {id(t): t for m in modules for t in (*m._parameters.values(), *m._buffers.values()) if t is not None}
        for tensor in tensors.values():
            is_parameter = isinstance(tensor, nn.Parameter)
            if not is_parameter and not tensor.is_floating_point():
                continue
            spec = sharding(tensor)  # it knows the global shape
            found = tuple(tensor.shape if spec is None else spec.shape)
            full = engines.full_shape(tensor) or (said.get(id(tensor)) if spec is None else None) or found
            blank = torch.empty(full, dtype=tensor.dtype, device="meta")
            memo[id(tensor)] = nn.Parameter(blank, requires_grad=False) if is_parameter else blank
        yield memo
    finally:
        for module, before, cls in saved:
            object.__setattr__(module, "__class__", cls)
            module.__dict__.clear()
            module.__dict__.update(before)


@dataclass
class TwinShapes:
    """Global shapes of each site at the real batch (``once``) and at twice the batch (``twice``, run when asked for).

    ``disordered``: why the order of what is sharded is unknown there.
    """

    once: Shapes = field(default_factory=dict)
    twice: Callable[[], Shapes] = dict
    failure: str = ""
    disordered: dict[tuple[Key, int], str] = field(default_factory=dict)


class _Run(NamedTuple):
    shapes: Shapes
    numbers: dict[Key, list[int]]  # of the same tensors in the trace
    stopped: str  # why it did not come to its end


class Twin:
    """Runs a meta copy of ``model`` (made anew each time: models keep state) and records shapes of ``watched``."""

    def __init__(
        self,
        model: nn.Module,
        engines: Wholeness,
        known: GlobalShapes,
        dim: int = 0,
        kept: Collection[tuple[int, ...]] = (),
    ) -> None:
        """``dim`` is where the model's inputs hold the batch. ``kept``: ranks whose groups the copy knows as the model
        does, as on axes that part the sequence."""
        self._model, self._engines, self._known, self._dim, self._kept = model, engines, known, dim, kept

    def shapes(self, args: tuple[Any, ...], kwargs: dict[str, Any], names: Watched) -> TwinShapes:
        """``names`` are the watched sides of modules of the real model by clean name."""
        inputs = args, kwargs

        @cache
        def twice() -> Shapes:
            with uncollected():
                return self._whole(double_batch(inputs, dim=self._dim), names).shapes

        with uncollected():
            try:
                trace = Trace()
                once = self._whole(inputs, names, trace)
            except Exception as error:  # it could not be copied
                return TwinShapes(failure=_told(error))
            return TwinShapes(once.shapes, twice, once.stopped, self._disordered(inputs, once, trace))

    def _whole(self, inputs: Any, names: Watched, trace: Trace | None = None) -> _Run:
        twin = self._copied()
        with self._engines.alone():
            return self._run(twin, inputs, names, trace)

    def _copied(self) -> nn.Module:
        with stripped(self._model, self._engines, self._kept, self._known) as memo:
            twin = copied(self._model, memo)
        self._engines.make_whole(twin)
        return twin

    def look(
        self, inputs: Any, names: Watched, recording: Callable[[Watched], AbstractContextManager[T]]
    ) -> tuple[T, str]:
        """One run with global shapes of which something else is kept: what ``recording`` of the copies of the watched
        modules yields, and why the run did not come to its end."""
        twin = self._copied()
        with self._engines.alone():
            return self._forward(twin, inputs, names, recording, None)

    def _disordered(self, inputs: Any, whole: _Run, trace: Trace) -> dict[tuple[Key, int], str]:
        """Where the model moves elements so that its shards are not in the order of the ranks."""
        with self._engines.mimicked() as mimic:
            if mimic is None:
                return {}
            try:
                with stripped(self._model, _AsItIs(self._engines), self._kept) as memo:
                    mine = copied(self._model, memo)
                mimic.prepare(mine)
                local = Trace()
                self._run(mine, inputs, {}, local)
                why = out_of_order(local, trace, cut=bool(whole.stopped))
            except Exception as error:
                if not mimic.exact:
                    return {}
                reason = f"its order could not be checked ({_told(error)})"
                return {(key, i): reason for key, found in whole.numbers.items() for i in range(len(found))}
        places = [((key, i), n) for key, found in whole.numbers.items() for i, n in enumerate(found)]
        return {place: why[n] for place, n in places if n in why}

    def _run(self, twin: nn.Module, inputs: Any, names: Watched, trace: Trace | None) -> _Run:
        numbers: dict[Key, list[int]] = {}

        def shapes(key: Key, found: list[Tensor]) -> list[tuple[int, ...]]:
            numbers[key] = [] if trace is None else [trace.number(t) for t in found]
            return [tuple(t.shape) for t in found]

        seen, stopped = self._forward(twin, inputs, names, lambda watched: recorded(watched, shapes), trace)
        return _Run(seen, numbers, stopped)

    def _forward(
        self,
        twin: nn.Module,
        inputs: Any,
        names: Watched,
        recording: Callable[[Watched], AbstractContextManager[T]],
        trace: Trace | None,
    ) -> tuple[T, str]:
        counterpart = dict(zip(map(id, self._model.modules()), twin.modules(), strict=True))
        watched = {name: counterpart[id(module)] for name, module in names.items() if id(module) in counterpart}

        def convert(tensor: Tensor) -> Tensor:
            tensor = tensor.detach()
            return tensor.to("meta") if tensor.is_floating_point() else tensor.clone()

        stopped = ""
        args, kwargs = copy_tree(inputs, convert)
        with torch.no_grad(), nonzero_is_full(), recording(watched) as seen, IntegersAreReal(trace):
            try:
                twin(*args, **kwargs)
            except Exception as stop:  # what was met before is no less true
                stopped = _told(stop)
        return seen, stopped


def _told(error: Exception) -> str:
    return str(error) if isinstance(error, Opaque) else f"{type(error).__name__}: {str(error)[:200]}"
