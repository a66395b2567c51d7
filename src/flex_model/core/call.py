"""``ActiveCall``: one forward of the whole model while it runs, and what outlives it until its backward is done."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from flex_model.core.bound import Bound
from flex_model.core.hook_function import Call
from flex_model.core.inference import Form
from flex_model.layout.claim import Claim
from flex_model.layout.layout import Layout
from flex_model.layout.probe import BatchDim
from flex_model.routing.rows import Gathered
from flex_model.trees import find_leaves, input_leaves

__all__ = ["ActiveCall", "Staged", "in_backward", "runs_already"]

in_backward = torch._C._current_graph_task_id  # -1 outside of a backward; a forward inside one is a recomputation


def runs_already(module: nn.Module) -> bool:
    """Whether ``module`` is being called inside a call of its own; asked in its pre-hook, and rarely.

    Counting calls would not do: a KeyboardInterrupt ends one without a hook that could count it.
    """
    frame, calls = sys._getframe(1), 0
    while frame is not None:
        if frame.f_code is nn.Module._call_impl.__code__ and frame.f_locals.get("self") is module:
            calls += 1
        frame = frame.f_back  # type: ignore[assignment]
    return calls > 1


def _innermost(module: nn.Module) -> nn.Module:
    """Without wrappers, which take whatever they are given."""
    while isinstance(inner := getattr(module, "module", None), nn.Module):
        module = inner
    return module


Snapshot = tuple[tuple[Any, ...], dict[str, object]]


def _fingerprint(value: Tensor) -> tuple[Any, ...]:
    flat = value.detach().flatten()
    return (tuple(value.shape), *flat[:: max(1, flat.numel() // 32)].tolist())


@dataclass(slots=True)
class Staged:
    """A captured local value on its way, with the form whose layout says how it becomes whole."""

    bound: Bound
    key: Any
    local: Tensor
    form: Form | None = None
    layout: Layout | None = None
    gradient: bool = False
    forward: int = 0  # of those since the last point
    selected: bool = False  # the hook's selection was made
    finish: Callable[[Tensor], Tensor] | None = None  # what is left of it once the value is whole
    microbatch: int = 0
    occurrence: int = 0  # which firing of its module within a microbatch
    idle: bool = False  # of a forward that runs for other ranks only
    batch: BatchDim | None = None  # where a step's microbatches are put together
    room: Tensor | None = None  # the full tensor, of which ``local`` is this rank's place
    rows: tuple[Gathered, ...] = ()  # of which tokens and experts, where rows are tokens at experts


@dataclass(eq=False, slots=True, weakref_slot=True)
class ActiveCall:
    """``module`` is the outermost module of this forward: the model, or a part that was called by itself."""

    module: nn.Module
    index: int
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    grad_mode: bool = False
    place: tuple[int, int] | None = None  # (stage, microbatch) in a pipeline's step
    idle: bool = False  # it runs for other ranks only, and has no rows
    depth: int = 0  # how often its module runs inside its own forward at the moment
    staged: list[Staged] = field(default_factory=list)
    claims: dict[Form, Claim] = field(default_factory=dict)
    snapshots: dict[tuple[int, int], list[Snapshot]] = field(default_factory=dict)
    edited: bool = False
    crossed: bool = False  # an edit has talked to ranks that need not run in lockstep, so that they do
    even_axes: frozenset[int] | None = None
    past: int = 0  # positions in the cache when it began, where an edit asks
    bounds: tuple[Bound, ...] = ()  # the hooks that were on: those of a recomputation, whatever is on by then

    @property
    def microbatch(self) -> int:
        return 0 if self.place is None else self.place[1]

    def describe(self, experts: Tensor | None = None) -> Call:
        """What an editing function sees of this call; ``experts`` of the rows it is given."""
        leaves = input_leaves(_innermost(self.module), self.args, self.kwargs)
        named = {leaf.path: leaf.tensor for leaf in leaves}
        positions = named.get("position_ids", named.get("cache_position"))
        lead = leaves[0].tensor if leaves else None
        decoding = lead is not None and lead.dim() > 1 and lead.shape[1] == 1 and self.past > 0
        phase: Literal["prefill", "decode"] = "decode" if decoding else "prefill"
        return Call(self.index, self.microbatch, phase, positions, experts, self.past, named.get("attention_mask"))

    def note_past(self) -> None:
        """How much the cache holds, which the first layer to run will change."""
        cache = self.kwargs.get("past_key_values")
        self.past = int(getattr(cache, "get_seq_length", lambda: 0)())

    def shapes_mark(self) -> int:
        """A number that ranks share when all their input shapes are equal."""
        shapes = [tuple(leaf.tensor.shape) for leaf in find_leaves((self.args, self.kwargs))]
        return hash(tuple(shapes)) & 0x7FFF_FFFF_FFFF

    @property
    def checkpointed(self) -> bool:
        """Whether what runs now may run again in the backward: reentrant checkpointing turns gradients off, the other
        kind hooks saved tensors."""
        if torch.is_grad_enabled():
            return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
        return self.grad_mode

    def remember(self, key: tuple[int, int], value: Tensor, state: dict[str, object]) -> None:
        self.snapshots.setdefault(key, []).append((_fingerprint(value), state))

    def recall(self, key: tuple[int, int], value: Tensor) -> dict[str, object] | None:
        """What ``save_ctx`` was when the edit ran on this value; a module may fire several times in a call."""
        found = self.snapshots.get(key, [])
        if len(found) == 1:
            return found[0][1]
        mark = _fingerprint(value)
        return next((state for known, state in found if known == mark), None)

    def drop_inputs(self) -> None:
        self.args, self.kwargs = (), {}
