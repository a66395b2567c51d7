"""Ways to capture and to edit the outputs of the same modules: by hand, with FlexModel, and with its peers.

Each takes the net and its input and gives two functions: ``capture()`` runs the net and returns what every module put
out; ``edit()`` runs it with every module's output doubled, and returns what comes out at the end. Nothing else of this
project is imported here, for it runs in the environments of the peers.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from itertools import accumulate
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["MODULES", "WAYS", "net"]

MODULES = 64
Pair = tuple[Callable[[], list[Tensor]], Callable[[], Tensor]]


class AddOne(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 1


def net() -> nn.Sequential:
    return nn.Sequential(*[AddOne() for _ in range(MODULES)])


def by_hand(x: Tensor) -> Pair:
    """Torch's hooks; captured values are copies, which nothing can change later."""
    seen: dict[int, Tensor] = {}
    watched, edited = net(), net()
    for i, module in enumerate(watched):
        module.register_forward_hook(lambda m, a, out, i=i: seen.__setitem__(i, out.detach().clone()))
    for module in edited:
        module.register_forward_hook(lambda m, a, out: out * 2)

    def capture() -> list[Tensor]:
        seen.clear()
        watched(x)
        return list(seen.values())

    return capture, lambda: edited(x)


def flex_model(x: Tensor) -> Pair:
    from flex_model import FlexModel, HookFunction

    output: dict[str, list[Tensor]] = {}
    watched, edited = FlexModel(net(), output), FlexModel(net())
    for name in watched.wrapped_module_names[1:]:
        watched.register_forward_hook(HookFunction(name))
        edited.register_forward_hook(HookFunction(name, editing_function=lambda t: t * 2, capture=False))

    def capture() -> list[Tensor]:
        output.clear()
        watched(x)
        return [values[0] for values in output.values()]

    return capture, lambda: edited(x)


def older(x: Tensor) -> Pair:
    """FlexModel 0.1.0, which knows NCCL alone: patched to run over gloo."""
    from speeds.older import FlexModel, HookFunction

    output: dict[str, list[Tensor]] = {}
    watched, edited = FlexModel(net(), output), FlexModel(net(), {})

    def double(module: Any, inputs: Tensor, save_ctx: Any, modules: Any) -> Tensor:
        return inputs * 2

    for i in range(MODULES):
        watched.register_forward_hook(HookFunction(str(i), (None, None, None)))
        edited.register_forward_hook(HookFunction(str(i), (None, None, None), double))

    def capture() -> list[Tensor]:
        output.clear()
        watched(x)
        return [values[0] for values in output.values()]

    return capture, lambda: edited(x)


def nnsight(x: Tensor) -> Pair:
    import nnsight

    model = nnsight.NNsight(net())

    def capture() -> list[Tensor]:
        with model.trace(x):
            seen = nnsight.save([module.output for module in model])
        return seen

    def edit() -> Tensor:
        with model.trace(x):
            for module in model:
                module.output = module.output * 2
            out = model.output.save()
        return out

    return capture, edit


class _Trace:
    """One module of baukit's ``TraceDict``, as it is documented: a hook for the length of a ``with`` block."""

    def __init__(self, module: nn.Module, edit_output: Callable[..., Any] | None, layer: str) -> None:
        takes = None if edit_output is None else inspect.signature(edit_output).parameters

        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            if edit_output is not None:
                assert takes is not None
                given = {"output": output, "layer": layer, "inputs": args}
                output = edit_output(**{name: given[name] for name in takes})
            self.output = output
            return output

        self.handle = module.register_forward_hook(hook)


def baukit(x: Tensor) -> Pair:
    model = net()

    def traced(edit_output: Callable[..., Any] | None) -> tuple[list[Tensor], Tensor]:
        traces = [_Trace(module, edit_output, name) for name, module in model.named_children()]
        try:
            out = model(x)
        finally:
            for trace in traces:
                trace.handle.remove()
        return [trace.output for trace in traces], out

    return lambda: traced(None)[0], lambda: traced(lambda output: output * 2)[1]


def transformer_lens(x: Tensor) -> Pair:
    from transformer_lens import HookedRootModule
    from transformer_lens.hook_points import HookPoint

    class Net(HookedRootModule):
        def __init__(self) -> None:
            super().__init__()
            self.layers = net()
            self.points = nn.ModuleList(HookPoint() for _ in range(MODULES))
            self.setup()

        def forward(self, x: Tensor) -> Tensor:
            for layer, point in zip(self.layers, self.points, strict=True):
                x = point(layer(x))
            return x

    model = Net()
    hooks = [(f"points.{i}", lambda value, hook: value * 2) for i in range(MODULES)]
    return (
        lambda: list(model.run_with_cache(x)[1].values()),
        lambda: model.run_with_hooks(x, fwd_hooks=hooks),
    )


def pyvene(x: Tensor) -> Pair:
    import pyvene

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers, self.config = net(), SimpleNamespace()  # which it asks for

        def forward(self, x: Tensor) -> Tensor:
            return self.layers(x)

    def model(intervention: Callable[[], Any]) -> Any:
        places = [{"component": f"layers[{i}].output", "intervention": intervention()} for i in range(MODULES)]
        return pyvene.IntervenableModel(places, Net())

    watched = model(pyvene.CollectIntervention)
    edited = model(lambda: lambda base, source: base * 2)
    return lambda: list(watched({"x": x})[0][1]), lambda: edited({"x": x})[1]


WAYS: dict[str, Callable[[Tensor], Pair]] = {
    way.__name__: way for way in (by_hand, flex_model, older, nnsight, baukit, transformer_lens, pyvene)
}


@torch.no_grad()
def check(way: str, x: Tensor) -> dict[str, Callable[[], Any]]:
    """The two functions of a way, once what they return is right."""
    capture, edit = WAYS[way](x)
    want = list(accumulate(range(MODULES), lambda value, _: value + 1, initial=x))[1:]
    found = capture()
    assert len(found) == MODULES and all(map(torch.equal, found, want)), f"{way}: captured values are wrong"
    doubled = x
    for _ in range(MODULES):
        doubled = (doubled + 1) * 2
    assert torch.allclose(edit(), doubled), f"{way}: the edited output is wrong"
    return {"capture": capture, "edit": edit}
