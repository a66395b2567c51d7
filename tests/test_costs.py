"""What a hook costs, in counts: calls of Python functions, operations of torch, collectives, bytes. Never in time.

A number here that has to grow is a change that users will feel: grow it on purpose.
"""

from __future__ import annotations

import gc
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard
from torch.utils._python_dispatch import TorchDispatchMode
from worlds import run_world

from flex_model import FlexModel, HookFunction, edits

FEW, MANY = 10, 60  # what a hook costs is the difference, shared by the hooks that one has more


class One(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 1


class Operations(TorchDispatchMode):
    """Operations of torch, and the bytes of new memory that they give."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.seen[func._schema.name] += 1
        given = {t.untyped_storage().data_ptr() for t in args if isinstance(t, Tensor)}
        if isinstance(out, Tensor) and out.untyped_storage().data_ptr() not in given:
            self.bytes += out.nbytes
        return out


def python_calls(run: Callable[[], object]) -> int:
    count = 0

    def note(frame: Any, event: str, arg: Any) -> None:
        nonlocal count
        count += event == "call"

    run()
    gc.collect()
    gc.disable()  # what it calls is not the hook's
    sys.setprofile(note)
    try:
        run()
    finally:
        sys.setprofile(None)
        gc.enable()
    return count


def costs(make: Callable[[int], Callable[[], object]], bare: Callable[[int], Callable[[], object]]) -> dict[str, float]:
    """Of one hook, without what its module costs: calls of Python functions, operations, bytes of new memory."""
    found = {}
    for number in (FEW, MANY):
        run, plain = make(number), bare(number)
        calls = python_calls(run) - python_calls(plain)
        with Operations() as ours:
            run()
        with Operations() as theirs:
            plain()
        operations = sum(ours.seen.values()) - sum(theirs.seen.values())
        found[number] = {"calls": calls, "operations": operations, "bytes": ours.bytes - theirs.bytes}
    return {k: round((found[MANY][k] - found[FEW][k]) / (MANY - FEW), 1) for k in found[FEW]}


def plain(x: Tensor) -> Callable[[int], Callable[[], object]]:
    def make(number: int) -> Callable[[], object]:
        net = nn.Sequential(*(One() for _ in range(number)))
        return lambda: net(x)

    return make


def hooked(x: Tensor, edit: Any = None, **options: Any) -> Callable[[int], Callable[[], object]]:
    layout = options.pop("layout", None)

    def make(number: int) -> Callable[[], object]:
        output: dict[str, list[Tensor]] = {}
        fm = FlexModel(nn.Sequential(*(One() for _ in range(number))), output, **options)
        for i in range(number):
            fm.register_forward_hook(HookFunction(str(i), editing_function=edit, capture=edit is None, layout=layout))

        def run() -> None:
            output.clear()
            fm(x)

        run()
        return run

    return make


@pytest.mark.parametrize(
    ("edit", "calls", "operations"),
    [
        (None, 8, 2),  # torch's own three, the hook, what is staged, its sink, two looks at the compiler; detach, clone
        (lambda t: t * 2, 7, 2),  # the hook, the function, as above; the product, a look at its size
    ],
)
def test_on_one_process(edit: Any, calls: int, operations: int) -> None:
    x = torch.randn(4, 8)
    with torch.no_grad():
        cost = costs(hooked(x, edit), plain(x))
    print(f"a hook on one process: {cost}")
    assert cost["calls"] <= calls and cost["operations"] == operations and cost["bytes"] == x.nbytes


def test_nothing_enabled_costs_nothing() -> None:
    """No hook is on the model, and its forward calls what it would call without FlexModel."""
    net = nn.Sequential(*(One() for _ in range(FEW)))
    x = torch.randn(4, 8)
    bare = python_calls(lambda: net(x))
    fm = FlexModel(net, {})
    module = fm.module
    for i in range(FEW):
        fm.register_forward_hook(HookFunction(str(i)))
    with fm.groups("all", complement=True):
        assert python_calls(lambda: module(x)) == bare
        assert all(not m._forward_hooks and not m._forward_pre_hooks for m in net.modules())


# Of a hook: its layout and edit, and at most so many calls of Python functions, operations, shards of new memory, and
# messages, these of all hooks together. The main rank does the most.
WAYS = {
    "replicated": (Replicate(), None, 70, 3, 1, 0),
    "sharded": (Shard(1), None, 114, 14, 3, 2),
    "steered": (Shard(1), edits.scale(2.0), 52, 1, 1, 0),
}


def _split(way: str) -> dict[str, float]:
    placement, edit, *_ = WAYS[way]
    mesh, x = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",)), torch.randn(4, 8)
    with torch.no_grad():
        found = costs(hooked(x, edit, mesh=mesh, layout={"tp": placement}), plain(x))
        run = hooked(x, edit, mesh=mesh, layout={"tp": placement})(MANY)
        with Operations() as operations:
            run()
    found["messages"] = sum(n for name, n in operations.seen.items() if name.startswith("c10d::"))
    found["shard"] = x.nbytes
    return found


@pytest.mark.parametrize("way", WAYS)
def test_on_two_processes(way: str) -> None:
    _, _, calls, operations, shards, messages = WAYS[way]
    for rank, cost in enumerate(run_world(2, _split, way)):
        print(f"a hook on two processes, {way}, rank {rank}: {cost}")
        assert cost["calls"] <= calls and cost["operations"] <= operations
        assert cost["bytes"] <= shards * cost["shard"]
        assert cost["messages"] <= messages
