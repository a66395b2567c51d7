"""What a hook costs on one process: captured and edited sites against hand-written torch hooks doing the same work.

64 modules ``x + 1`` of (1, 1, 576), paired in one run: each round times every way once, in turn; the figures are
medians over rounds of CPU time, and their ratio to the hand-written hook.

    python benchmarks/hook_overhead.py [--rounds 150]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from flex_model import FlexModel, HookFunction

MODULES = 64


class AddOne(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 1


def model() -> nn.Sequential:
    return nn.Sequential(*[AddOne() for _ in range(MODULES)])


def plain(x: Tensor) -> Callable[[], object]:
    net = model()
    return lambda: net(x)


def empty(x: Tensor) -> Callable[[], object]:
    net = model()
    for module in net:
        module.register_forward_hook(lambda m, a, o: None)
    return lambda: net(x)


def hand_capture(x: Tensor) -> Callable[[], object]:
    net = model()
    seen: dict[int, list[Tensor]] = {}
    for i, module in enumerate(net):
        module.register_forward_hook(lambda m, a, o, i=i: seen.setdefault(i, []).append(o.detach().clone()))

    def run() -> None:
        seen.clear()
        net(x)

    return run


def hand_edit(x: Tensor) -> Callable[[], object]:
    net = model()
    for module in net:
        module.register_forward_hook(lambda m, a, o: o * 2)
    return lambda: net(x)


def flex(x: Tensor, *, edit: bool, enabled: bool = True) -> Callable[[], object]:
    output: dict[str, list[Tensor]] = {}
    fm = FlexModel(model(), output)
    for name in fm.wrapped_module_names[1:]:
        fn = (lambda t: t * 2) if edit else None
        fm.register_forward_hook(HookFunction(name, editing_function=fn, capture=not edit))
    net = fm.module
    off = ExitStack()
    if not enabled:
        off.enter_context(fm.groups("all", complement=True))

    def run() -> None:
        output.clear()
        net(x)

    run.keep = fm, off  # type: ignore[attr-defined]
    return run


def measure(rounds: int) -> dict[str, float]:
    """Median CPU microseconds a module call."""
    torch.set_num_threads(1)
    x = torch.randn(1, 1, 576)
    ways = {
        "no hook": plain(x),
        "empty torch hook": empty(x),
        "hand-written capture": hand_capture(x),
        "flex-model capture": flex(x, edit=False),
        "hand-written edit": hand_edit(x),
        "flex-model edit": flex(x, edit=True),
        "flex-model, disabled": flex(x, edit=True, enabled=False),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    with torch.no_grad():
        for _ in range(rounds):
            for name, run in ways.items():
                start = time.process_time_ns()
                run()
                times[name].append((time.process_time_ns() - start) / 1000 / MODULES)
    return {name: statistics.median(t[rounds // 10 :]) for name, t in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=150)
    figures = measure(parser.parse_args().rounds)
    base = figures["no hook"]
    print(f"{'way':24} {'us a call':>10} {'above no hook':>14} {'ratio to hand-written':>22}")
    for name, value in figures.items():
        kind = "capture" if "capture" in name else "edit" if "edit" in name else ""
        hand = figures.get(f"hand-written {kind}")
        ratio = f"{value / hand:.2f} ({(value - base) / (hand - base):.2f} above no hook)" if hand else ""
        print(f"{name:24} {value:10.2f} {value - base:14.2f} {ratio:>22}")


if __name__ == "__main__":
    main()
