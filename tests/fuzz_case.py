"""A fuzz case as data, and what the oracle makes of it: plain torch hooks on the unsharded net, in one process."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import fuzz_edits
import fuzz_models
import torch
from fuzz_models import Scene
from torch import Tensor, nn

from flex_model import Site
from flex_model.core.editing import seeded

GRADIENTS = ("full_backward", "full_backward_pre", "tensor")


@dataclass(frozen=True)
class Hook:
    """One hook; ``rounds``: the first and the last it is there in. ``grad`` and ``deliver`` are those of a capture."""

    name: str
    kind: str = "forward"
    via: str = "capture"  # "capture", "edit" or "register"
    idx: Any = 0
    select: Any = None
    edit: str = ""
    run: str = "every_rank"
    axes: tuple[str, ...] | None = None
    deliver: str = "all"
    grad: bool = False
    groups: tuple[str, ...] = ()
    rounds: tuple[int, int] = (0, 99)
    attached: bool = False  # the capture hands out the graph, and the loss has the value in it

    @property
    def captures(self) -> bool:
        return self.via != "edit"

    @property
    def is_gradient(self) -> bool:
        return self.kind in GRADIENTS

    @property
    def side(self) -> str:
        return {"forward": "out", "full_backward_pre": "out", "tensor": "param"}.get(self.kind, "in")


@dataclass(frozen=True)
class Round:
    """Forwards with the same hooks on; ``backward``: "" (no gradients), "each", "together" or "reversed"."""

    forwards: int = 1
    backward: str = "each"
    groups: tuple[str, ...] | None = None
    complement: bool = False
    in_call: bool = False  # groups are chosen by forward(groups=...), else by fm.groups
    keep: bool = False  # gradients of the round before are added to


@dataclass(frozen=True)
class Case:
    scene: Scene
    hooks: tuple[Hook, ...] = ()
    rounds: tuple[Round, ...] = (Round(),)
    deliver: str = "all"
    bitwise: bool = False

    def at(self, number: int) -> list[tuple[int, Hook]]:
        """The hooks of a round in the order in which they run: registered ones, then those of blocks."""
        there = [(i, h) for i, h in enumerate(self.hooks) if h.rounds[0] <= number <= h.rounds[1]]
        registered = sorted((p for p in there if p[1].via == "register"), key=lambda p: (p[1].rounds[0], p[0]))
        return registered + [p for p in there if p[1].via != "register"]

    def enabled(self, number: int) -> list[tuple[int, Hook]]:
        """Those whose groups are on."""
        now, chosen = self.rounds[number], self.rounds[number].groups
        if chosen is None:
            return self.at(number)
        on = lambda h: "all" in chosen or bool(set(h.groups) & set(chosen))  # noqa: E731
        return [(i, h) for i, h in self.at(number) if h.via != "register" or on(h) != now.complement]

    @property
    def only_reads(self) -> bool:
        return all(
            not h.attached and (not h.edit or (h.edit in fuzz_edits.READ_ONLY and h.run == "every_rank"))
            for h in self.hooks
        )


class Keys:
    """The keys of ``output_ptr``, as documented: the first hook type on a module has its plain name."""

    def __init__(self) -> None:
        self._owner: dict[str, tuple[str, Any]] = {}
        self._holders: dict[str, list[int]] = defaultdict(list)
        self.of: dict[int, Any] = {}

    def add(self, number: int, hook: Hook) -> None:
        owner = self._owner.get(hook.name)
        if owner is None or owner == (hook.kind, hook.idx):
            self._owner[hook.name] = (hook.kind, hook.idx)
            self._holders[hook.name].append(number)
            self.of[number] = hook.name
        else:
            self.of[number] = Site(hook.name, hook.kind, hook.idx)

    def drop(self, number: int, hook: Hook) -> None:
        if self.of.get(number) == hook.name:
            self._holders[hook.name].remove(number)
            if not self._holders[hook.name]:
                del self._owner[hook.name]


def choose(leaves: list[tuple[str, Tensor]], idx: Any) -> list[int]:
    """The positions that ``unpack_idx`` names."""
    if idx == "all":
        return list(range(len(leaves)))
    if isinstance(idx, int):
        return [idx % len(leaves)] if -len(leaves) <= idx < len(leaves) else []
    if isinstance(idx, str):
        return [i for i, (path, _) in enumerate(leaves) if path == idx or path.startswith(f"{idx}.")]
    return [i for one in idx for i in choose(leaves, one)]


def trainables(scene: Scene) -> nn.ModuleDict:
    torch.manual_seed(7)
    dtype = getattr(torch, scene.dtype)
    return nn.ModuleDict({"gain": nn.Linear(1, 1), "probe": nn.Linear(scene.width, scene.width)}).to(dtype)


class Oracle:
    """Runs a case on the plain net. ``seen``: {(sink, key): the tensors in it}; a sink is a hook's number (of a
    capture's gradients: the number and "grad"), or "out" for ``output_ptr``."""

    def __init__(self, case: Case) -> None:
        self.case, self.scene = case, case.scene
        self.net = fuzz_models.make(replace(case.scene, recompute=""))
        self.modules = trainables(case.scene)
        self.save_ctx = SimpleNamespace()
        self.seen: dict[tuple[Any, Any], list[Tensor]] = defaultdict(list)
        self.outputs: list[Any] = []
        self.input_grads: list[list[Tensor | None]] = []
        self.grads: list[dict[str, Tensor]] = []  # after each round
        self.keys = Keys()
        self.attached: list[Tensor] = []  # of the forward that runs
        self.now: list[tuple[int, Hook]] = []
        self.calls = 0
        self.index_of: dict[int, int] = {}  # of a forward: what its hooks are told
        self.backward_of = 0
        self._install()

    # -- torch's hooks -----------------------------------------------------------------------------------------
    def _install(self) -> None:
        for name, module in self.net.named_modules():

            def before(m: nn.Module, args: Any, kwargs: Any, name: str = name) -> Any:
                found = fuzz_models.input_leaves(m, args, kwargs)
                new = self._visit(name, "in", found)
                return None if new is None else fuzz_models.replaced((args, kwargs), new)

            def after(m: nn.Module, args: Any, kwargs: Any, output: Any, name: str = name) -> Any:
                new = self._visit(name, "out", fuzz_models.leaves(output))
                return None if new is None else fuzz_models.replaced(output, new)

            module.register_forward_pre_hook(before, with_kwargs=True)
            module.register_forward_hook(after, with_kwargs=True)
        for name, parameter in self.net.named_parameters():
            parameter.register_hook(lambda g, name=name: self._on_parameter(name, g))

    def _visit(self, name: str, side: str, leaves: list[tuple[str, Tensor]]) -> list[Tensor] | None:
        here = [(n, h) for n, h in self.now if h.name == name and h.side == side]
        if not here:
            return None
        now = [t for _, t in leaves]
        for number, hook in (p for p in here if not p[1].is_gradient):
            chosen = choose(leaves, hook.idx)
            for i in chosen:
                if hook.captures:
                    self._note(number, hook, i, len(chosen) > 1, fuzz_edits.take(hook.select, now[i]))
                now[i] = self._edited(hook, i, now[i], self.calls)
        if torch.is_grad_enabled():
            watched: dict[int, list[tuple[int, Hook, bool]]] = defaultdict(list)
            for number, hook in (p for p in here if p[1].is_gradient or p[1].grad):
                chosen = choose(leaves, hook.idx)
                for i in chosen:
                    watched[i].append((number, hook, len(chosen) > 1))
            for i, watchers in watched.items():
                now[i] = self._watched(i, now[i], watchers)
        return now

    def _watched(self, i: int, value: Tensor, watchers: list[tuple[int, Hook, bool]]) -> Tensor:
        if not value.is_floating_point():
            return value
        if not value.requires_grad:
            if not any(h.grad for _, h, _ in watchers):
                return value
            value = value.detach().requires_grad_()
        alias, call = value.clone(), self.calls

        def on_gradient(grad: Tensor) -> Tensor:
            for number, hook, several in watchers:
                if hook.is_gradient:
                    self._note(number, hook, i, several, fuzz_edits.take(hook.select, grad))
                    grad = self._edited(hook, i, grad, call)
                else:
                    self._note((number, "grad"), hook, i, several, grad)
            return grad

        alias.register_hook(on_gradient)
        return alias

    def _on_parameter(self, name: str, grad: Tensor) -> Tensor:
        for number, hook in self.now:
            if hook.kind == "tensor" and hook.name == name:
                self._note(number, hook, 0, False, fuzz_edits.take(hook.select, grad))
                grad = self._edited(hook, 0, grad, self.index_of[self.backward_of])
        return grad

    def _note(self, sink: Any, hook: Hook, index: int, several: bool, value: Tensor) -> None:
        if not hook.captures:
            return
        if hook.attached:
            self.attached.append(value)
        key = self.keys.of[sink] if hook.via == "register" else hook.name
        key = Site(hook.name, hook.kind, index) if several else key
        self.seen["out" if hook.via == "register" else sink, key].append(value.detach().clone())

    def _edited(self, hook: Hook, index: int, x: Tensor, call: int) -> Tensor:
        if not hook.edit:
            return x
        part = fuzz_edits.take(hook.select, x)
        given = part.clone() if hook.edit in fuzz_edits.IN_PLACE else part
        now = SimpleNamespace(index=call)
        if hook.edit == "random":
            with seeded(0, (hook.name, hook.kind, index), call, x.device):
                out = fuzz_edits.answer(hook.edit, given.contiguous(), now, self.save_ctx, self.modules)
        else:
            out = fuzz_edits.answer(hook.edit, given, now, self.save_ctx, self.modules)
        if out is None:
            out = given if hook.edit in fuzz_edits.IN_PLACE else None
        return x if out is None else fuzz_edits.put(hook.select, x, out)

    # -- running -----------------------------------------------------------------------------------------------
    def run(self) -> Oracle:
        done = 0
        for number, now in enumerate(self.case.rounds):
            for i, hook in enumerate(self.case.hooks):
                if hook.via == "register" and hook.rounds[1] == number - 1:
                    self.keys.drop(i, hook)
            for i, hook in self.case.at(number):
                if hook.via == "register" and hook.rounds[0] == number:
                    self.keys.add(i, hook)
            self.now = self.case.enabled(number)
            if not now.keep:
                zero(self.net, self.modules)
            self._round(now, done)
            done += now.forwards
            named = {**dict(self.net.named_parameters()), **dict(self.modules.named_parameters("trainable_modules"))}
            self.grads.append({n: p.grad.clone() for n, p in named.items() if p.grad is not None})
        return self

    def _round(self, now: Round, done: int) -> None:
        def forward(call: int) -> Tensor:
            ids, more = fuzz_models.inputs(self.scene, call)
            leaves = [t for t in (ids, *(more or {}).values()) if t.is_floating_point()]
            for t in leaves:
                t.requires_grad_(now.backward != "")
            self.input_leaves.append(leaves)
            output = self.net(ids) if more is None else self.net(ids, more)
            self.index_of[call] = self.calls
            self.calls += bool(self.now)
            self.outputs.append(
                fuzz_models.replaced(output, [t.detach().clone() for _, t in fuzz_models.leaves(output)])
            )
            ranks = range(len(self.scene.batches))
            losses = [fuzz_models.loss(fuzz_models.part(self.scene, output, r)) for r in ranks]
            used, self.attached = self.attached, []
            return torch.stack(losses).mean() + beside(used) if now.backward else torch.zeros(())

        self.input_leaves: list[list[Tensor]] = []
        backwards(now, forward, done, lambda call: setattr(self, "backward_of", call))
        self.input_grads += [[t.grad for t in leaves] for leaves in self.input_leaves]


def beside(values: list[Tensor]) -> Any:
    """A loss of values that were handed out with their graph."""
    return sum((0.3 * v.pow(2).mean() for v in values), 0.0)


def _nothing(call: int) -> None:
    pass


def backwards(now: Round, forward: Callable[[int], Tensor], done: int, began: Callable[[int], None] = _nothing) -> None:
    """The forwards and backwards of a round, in its order; ``began`` is told of which forward a backward begins."""
    calls = range(done, done + now.forwards)
    if not now.backward:
        with torch.no_grad():
            for call in calls:
                forward(call)
    elif now.backward == "each":
        for call in calls:
            loss = forward(call)
            began(call)
            backward(loss)
    else:
        losses = {call: forward(call) for call in calls}
        if now.backward == "together":
            began(calls[-1])
            backward(sum(list(losses.values())[1:], losses[calls[0]]))
        else:
            for call in reversed(calls):
                began(call)
                backward(losses[call])


def backward(loss: Tensor) -> None:
    if loss.requires_grad:  # an edit may have cut off all there is
        loss.backward()


def zero(*modules: nn.Module) -> None:
    for module in modules:
        for parameter in module.parameters():
            parameter.grad = None
