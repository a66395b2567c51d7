"""``Bound``: a HookFunction registered on one model, with everything that can be decided before it fires."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from flex_model.core.hook_function import EditCall, HookFunction, HookType, Site
from flex_model.layout.layout import Layout
from flex_model.routing.item import Deliver
from flex_model.routing.part import Part
from flex_model.routing.rows import RowSource
from flex_model.routing.selection import Selection

__all__ = ["WATCHED", "Bound", "ShardSink", "Sink"]

WATCHED = "watched"


class Sink(Protocol):
    """Where captured values end up."""

    def put(self, key: str | Site, value: Any) -> None: ...


class ShardSink(Protocol):
    """Takes each rank's own shards, as soon as their layout is known and without any word between ranks.

    ``local`` may be the model's own memory, which goes on changing.
    """

    def meet(self, key: str | Site, local: Tensor, layout: Layout) -> None: ...


@dataclass(eq=False, slots=True)
class Bound:
    """One registered hook. ``side`` is where it sits on the module: its input, its output, or a parameter."""

    hook: HookFunction
    hook_type: HookType
    name: str  # clean
    key: str | Site
    module: nn.Module | None  # None: it is on another stage of a pipeline
    sink: Sink | None = None
    gradient_sink: Sink | None = None
    edit: EditCall | None = None
    wants_call: bool = False
    takes_value_only: bool = False
    uses_context: bool = False  # the editing function gets save_ctx
    may_write: bool = False  # the editing function looks as if it wrote in place
    alike: bool = False  # the edit is made on shards, by all ranks, and fails on all or on none
    on_part: Callable[[Tensor, Part], Tensor] | None = None  # the edit of a rank's own part as a plain tensor
    part: tuple[Layout, torch.Size, Part | None] | None = None  # for values of the last layout and shape
    deliver: Deliver = "main"
    attached: bool = False
    selection: Selection | None = None
    override: tuple[Any, ...] = ()
    axes: tuple[int, ...] | None = None
    apart: bool = False  # its values are moved with their flattened dim 0 taken apart
    source: RowSource | None = None  # what knows the rows here, inside a mixture of experts
    enabled: bool = True
    temporary: bool = False  # of capture and edit: the choice of groups does not apply
    fired: int = 0
    tried: set[int] = field(default_factory=set)  # indices at which check mode has tried the edit
    told: bool = False  # that there is nothing to hook in the value
    since: int = 0  # the number of calls before it was registered
    met: str = ""  # of its gradient: WATCHED for, or why not; empty where its value was not met
    reached: int = 0  # gradients met, also refused ones
    missed: str = ""  # why it did not fire although it should have
    is_gradient: bool = field(init=False)
    side: str = field(init=False)

    def __post_init__(self) -> None:
        self.is_gradient = self.hook_type in ("full_backward", "full_backward_pre", "tensor")
        self.side = {"forward": "out", "full_backward_pre": "out", "tensor": "param"}.get(self.hook_type, "in")

    @property
    def concerns_others(self) -> bool:
        """Whether ranks have anything to tell one another of it at the end of a forward."""
        return not self.alike or self.sink is not None or self.gradient_sink is not None

    def site(self, index: int) -> Site:
        return Site(self.name, self.hook_type, index)

    def key_of(self, index: int, several: bool) -> str | Site:
        """The key of the captured tensor ``index``; of several tensors only the first has the plain name."""
        return self.key if not several else self.site(index)

    @property
    def where(self) -> str:
        return f"{self.name or '(the model)'} ({self.hook_type})"


def check_expected(bound: Bound, value: Tensor | tuple[int, ...]) -> str:
    """What is wrong with a full value under ``expected_shape``; empty if nothing."""
    expected = bound.hook.expected_shape
    shape = tuple(value) if isinstance(value, tuple) else tuple(value.shape)
    if expected is None:
        return ""
    if len(expected) == len(shape) and all(e is None or e == s for e, s in zip(expected, shape, strict=True)):
        return ""
    return f"{bound.where}: expected_shape is {expected}, the full value is {shape}; correct it or leave it out."
