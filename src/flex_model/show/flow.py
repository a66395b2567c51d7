"""``watch_flow``: how values flow between the modules that one module calls: the diagram of a block.

Every operator of one forward is followed: what it makes comes from what its inputs come from, until a module hands it
out. Sums and products of values that come from different modules are nodes of their own, such as those of a residual
stream.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from flex_model.trees import tensors

__all__ = ["IN", "OUT", "Flow", "joined", "watch_flow"]

IN, OUT = "in", "out"
_SIGNS = {"add": "+", "mul": "\u00d7"}
Origins = frozenset[str]


@dataclass(slots=True)
class Flow:
    """Inside one module: arrows from label to label. Labels are those of called modules, ``in`` and ``out`` of the
    module itself, and ``+`` or ``×``, with a number from the second on."""

    arrows: dict[tuple[str, str], None] = field(default_factory=dict)

    @property
    def labels(self) -> list[str]:
        return list(dict.fromkeys(label for arrow in self.arrows for label in arrow))

    def merged(self, names: Mapping[str, str]) -> Flow:
        """With other labels; what then is one node has no arrow to itself."""
        renamed = ((names.get(a, a), names.get(b, b)) for a, b in self.arrows)
        return Flow({(a, b): None for a, b in renamed if a != b})


@dataclass(slots=True)
class _Frame:
    """A module that is running: where the values that it can see come from, by storage."""

    name: str
    flow: Flow
    origins: dict[int, Origins] = field(default_factory=dict)
    signs: dict[str, int] = field(default_factory=dict)
    caller: _Frame | None = None

    def of(self, value: Tensor) -> Origins:
        found = self.origins.get(_storage(value))
        if found is None:  # what callers have is from outside; parameters are from nowhere
            return frozenset({IN}) if self.caller is not None and self.caller.of(value) else frozenset()
        return found

    def arrive(self, origins: Origins, label: str) -> None:
        for origin in sorted(origins):
            if origin != label:
                self.flow.arrows[origin, label] = None

    def node(self, sign: str) -> str:
        count = self.signs[sign] = self.signs.get(sign, 0) + 1
        return sign if count == 1 else f"{sign} {count}"


def _storage(value: Tensor) -> int:
    value = value._local_tensor if isinstance(value, DTensor) else value
    value = getattr(value, "elem", value)  # of a collective that is not over yet
    try:
        return int(value.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):  # a quantised weight, say, has none of its own
        return -id(value)


class _Watch(TorchDispatchMode):
    def __init__(self, names: Mapping[int, str]) -> None:
        super().__init__()
        self.flows: dict[str, Flow] = {}
        self._names, self._frames = names, list[_Frame]()

    def enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        given = tensors((args, kwargs))
        if self._frames:
            caller = self._frames[-1]
            caller.arrive(frozenset[str]().union(*map(caller.of, given)), self._label(module))
        name = self._names[id(module)]
        flow = Flow() if name in self.flows else self.flows.setdefault(name, Flow())
        frame = _Frame(name, flow, caller=self._frames[-1] if self._frames else None)
        frame.origins.update((_storage(t), frozenset({IN})) for t in given)
        self._frames.append(frame)

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        frame, made = self._frames.pop(), tensors(output)
        frame.arrive(frozenset[str]().union(*map(frame.of, made)), OUT)
        if self._frames:
            label = frozenset({self._label(module)})
            self._frames[-1].origins.update((_storage(t), label) for t in made)

    def _label(self, module: nn.Module) -> str:
        name, caller = self._names[id(module)], self._frames[-1].name
        return name.removeprefix(f"{caller}.") if caller else name

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if self._frames:
            self._follow(func, [a for a in pytree.tree_leaves((args, kwargs)) if isinstance(a, Tensor)], made)
        return made

    def _follow(self, func: Any, given: list[Tensor], made: Any) -> None:
        frame = self._frames[-1]
        origins = frozenset[str]().union(*map(frame.of, given))
        sign = _SIGNS.get(func.__name__.partition(".")[0].rstrip("_"))
        if sign and len(given) == 2 and given[0].shape == given[1].shape and given[0].is_floating_point():
            one, other = map(frame.of, given)
            if one and other and one.isdisjoint(other):
                label = frame.node(sign)
                frame.arrive(origins, label)
                origins = frozenset({label})
        for value in (v for v in pytree.tree_leaves(made) if isinstance(v, Tensor)):
            frame.origins[_storage(value)] = origins


@contextmanager
def watch_flow(modules: Mapping[str, nn.Module]) -> Iterator[dict[str, Flow]]:
    """{clean name: its flow at its first call} of what runs in the block, of modules that call others."""
    names = {id(m): n for n, m in reversed(list(modules.items()))}
    watch = _Watch(names)
    handles = []
    for module in dict.fromkeys(modules.values()):
        handles.append(module.register_forward_pre_hook(watch.enter, with_kwargs=True))
        handles.append(module.register_forward_hook(watch.leave))
    flows: dict[str, Flow] = {}
    try:
        with torch.no_grad(), watch:
            yield flows
    finally:
        for handle in handles:
            handle.remove()
        flows.update({n: f for n, f in watch.flows.items() if any({*a} - {IN, OUT} for a in f.arrows)})


def joined(told: Iterable[Mapping[str, Flow]]) -> dict[str, Flow]:
    """The flows of all stages of a pipeline in their order: what one hands out is what comes into the next."""
    flows: dict[str, Flow] = {}
    for name, flow in (pair for theirs in told for pair in theirs.items()):
        before = flows.setdefault(name, Flow())
        ends = [a for a, b in before.arrows if b == OUT]
        if not ends:
            before.arrows.update(flow.arrows)
            continue
        arrows = [(a, b) for a, b in before.arrows if b != OUT]
        arrows += [(end, b) for a, b in flow.arrows if a == IN for end in ends]
        arrows += [(a, b) for a, b in flow.arrows if a != IN]
        flows[name] = Flow(dict.fromkeys(arrows))
    return flows
