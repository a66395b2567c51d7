"""Shared by several test files: torch's own hooks as the oracle, and what must stay as it was on failure."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flex_model import FlexModel
from flex_model.core.unfired.compiled import something_is_compiled

REGISTER = {
    "forward": "register_forward_hook",
    "forward_pre": "register_forward_pre_hook",
    "full_backward": "register_full_backward_hook",
    "full_backward_pre": "register_full_backward_pre_hook",
    "tensor": "register_hook",
}


def torch_hook(model: nn.Module, name: str, kind: str, fn: Callable[[Tensor], Tensor | None]) -> Any:
    """``fn`` on the only tensor of a place, by the hook that torch itself has for it."""

    def only(grads: tuple[Tensor, ...]) -> tuple[Tensor] | None:
        new = fn(grads[0])
        return None if new is None else (new,)

    if kind == "tensor":
        return model.get_parameter(name).register_hook(fn)
    module = model.get_submodule(name)
    if kind == "forward":
        return module.register_forward_hook(lambda m, args, out: fn(out))
    if kind == "forward_pre":
        return module.register_forward_pre_hook(lambda m, args: fn(args[0]))
    if kind == "full_backward":
        return module.register_full_backward_hook(lambda m, grad_in, grad_out: only(grad_in))
    return module.register_full_backward_pre_hook(lambda m, grad_out: only(grad_out))


def keep(into: list[Tensor]) -> Callable[[Tensor], None]:
    """A hook that only looks."""
    return lambda t: into.append(t.detach().clone())


def installed(model: nn.Module) -> int:
    """How many hooks torch holds for a model, of any kind."""
    tables = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    of_modules = sum(len(getattr(m, t)) for m in model.modules() for t in tables)
    return of_modules + sum(len(p._backward_hooks or ()) for p in model.parameters())


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def same_gradients(a: nn.Module, b: nn.Module) -> bool:
    mine, theirs = gradients(a), gradients(b)
    return mine.keys() == theirs.keys() and all(torch.equal(mine[n], theirs[n]) for n in mine)


@contextmanager
def unchanged(fm: FlexModel) -> Iterator[None]:
    """Hooks, groups, torch's hooks and captured values are the same afterwards."""

    def state() -> tuple[Any, ...]:
        captured = {key: [id(v) for v in values] for key, values in fm.output_ptr.items()}
        return fm.hooks(), installed(fm.module), captured, fm.trainable_modules_names

    before = state()
    yield
    assert state() == before


@pytest.fixture(autouse=True)
def nothing_compiled() -> Iterator[None]:
    """What one test has compiled is gone before the next."""
    yield
    if something_is_compiled():
        torch.compiler.reset()


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """The parity table: what tests printed of sites exact of sites tried."""
    reports = [r for kind in ("passed", "failed") for r in terminalreporter.stats.get(kind, []) if r.when == "call"]
    printed = [line for r in reports for line in r.capstdout.splitlines() if re.search(r"\d+ exact of \d+", line)]
    counts = [re.search(r"(\d+) exact of (\d+)", line) for line in dict.fromkeys(printed)]
    if counts:
        terminalreporter.section("sites and edits equal to the oracle")
        for line in dict.fromkeys(printed):
            terminalreporter.write_line(line)
        exact, tried = (sum(int(c[i]) for c in counts if c) for i in (1, 2))
        terminalreporter.write_line(f"in all: {exact} exact of {tried} tried; the rest is refused by name")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Commands that run in this process take all cores; the worlds of later tests share them."""
    yield
    torch.set_num_threads(1)
