"""Every named module of a model under an engine, all five hook types, against the oracle."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from flex_model import FlexModel, Site
from flex_model.errors import FlexModelError
from oracle import Count, plain_hooks, relative_error

TYPES = ("forward", "forward_pre", "full_backward_pre", "full_backward")


def as_key(name: str, hook_type: str, index: int, count: int) -> Any:
    return name if count == 1 else Site(name, hook_type, index)


def compare(
    model: nn.Module,
    plain: nn.Module,
    run: Callable[[nn.Module], Tensor],
    run_plain: Callable[[nn.Module], Tensor],
    *,
    types: Sequence[str] = TYPES,
    tolerance: float = 1e-5,
    deliver: str = "all",
) -> Count:
    """``run`` makes the local loss on the engine's model, ``run_plain`` the oracle's loss on the plain one."""
    backward = any("backward" in t for t in types)
    want = plain_hooks(plain, run_plain, backward=backward)
    fm = FlexModel(model)
    names = [n for n in fm.wrapped_module_names if any((n, t, 0) in want for t in types)]
    count = Count()
    from contextlib import ExitStack

    with ExitStack() as stack:
        acts = {
            t: stack.enter_context(fm.capture(names, hook_type=t, unpack_idx="all", deliver=deliver)) for t in types
        }
        loss = run(fm)
        if backward:
            loss.backward()
    for (name, kind, index), values in want.items():
        if kind not in types:
            continue
        several = sum(1 for n, k, _ in want if (n, k) == (name, kind)) > 1
        sites = {i for n, k, i in want if n == name and k == kind.replace("full_backward_pre", "forward").replace("full_backward", "forward_pre")}
        count_of = max(len(sites), 1) if "backward" in kind else (2 if several else 1)
        key = as_key(name, kind, index, count_of)
        label = f"{name or '(root)'}.{kind}[{index}]"
        try:
            got: Any = acts[kind].calls(key)
        except (FlexModelError, KeyError) as error:
            got = error
        if not isinstance(got, Exception) and "backward" in kind:
            values = values  # both in the order of arrival
        count.add(label, got, values, tolerance)
    for name, p in plain.named_parameters():
        if backward and p.grad is not None:
            continue
    return count


def gradients_match(fm: FlexModel, plain: nn.Module, tolerance: float = 1e-5) -> list[str]:
    """Parameters whose full gradient differs from the oracle's."""
    bad = []
    table = dict(fm.named_parameters())
    for name, parameter in plain.named_parameters():
        mine = table.get(name)
        if mine is None or parameter.grad is None:
            continue
        grad = mine.grad
        if grad is None:
            bad.append(f"{name}: none")
            continue
        grad = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
        error = relative_error(grad, parameter.grad)
        if error > tolerance:
            bad.append(f"{name}: {error:.2g}")
    return bad


def square(output: Any) -> Tensor:
    """A loss with a gradient everywhere."""
    logits = output.logits if hasattr(output, "logits") else output
    logits = logits if isinstance(logits, Tensor) else logits[0]
    return logits.float().pow(2).mean()


torch.manual_seed(0)
