"""Compiled parts of a model, which step aside while a hook is inside them: what was compiled without it would not run
it, and says nothing."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

__all__ = ["Compiled", "is_compiled", "something_is_compiled"]


def is_compiled(module: nn.Module) -> bool:
    """Whether calls of this module run compiled: by ``.compile()``, ``torch.compile`` of it, or of its forward."""
    return module._compiled_call_impl is not None or _is_optimized(module) or _original(module) is not None


def something_is_compiled() -> bool:
    """Whether the compiler holds code for any function: the model's modules may run inside of it."""
    conversion = sys.modules.get("torch._dynamo.convert_frame")
    entries = getattr(sys.modules.get("torch._dynamo.eval_frame"), "_debug_get_cache_entry_list", None)
    seen = getattr(getattr(conversion, "input_codes", None), "seen", ())
    codes = [code for reference in list(seen) if (code := reference()) is not None]
    return bool(codes) if entries is None else any(entries(code) for code in codes)


def _is_optimized(module: nn.Module) -> bool:
    return "_orig_mod" in module._modules and "dynamo_ctx" in module.__dict__


def _original(module: nn.Module) -> Callable[..., Any] | None:
    """What was compiled to make this module's forward."""
    found: Callable[..., Any] | None = getattr(module.__dict__.get("forward"), "_torchdynamo_orig_callable", None)
    return found


class Compiled:
    """The compiled parts that have stepped aside, and what brings them back."""

    def __init__(self) -> None:
        self._back: list[Callable[[], None]] = []

    def step_aside(self, around: Iterable[nn.Module]) -> bool:
        """Let all that is compiled of these modules, which hold hooked ones, run as it is written.

        Whether hooks will be met by the compiler all the same, because somebody else has compiled the model's code.
        """
        if "torch._dynamo" not in sys.modules:
            return False
        around = list(around)
        for module in around:
            self._step_aside(module)
        return any([_forget(type(m).forward) for m in around])

    def _step_aside(self, module: nn.Module) -> None:
        compiled = module._compiled_call_impl
        if compiled is not None:
            module._compiled_call_impl = None

            def call_back() -> None:
                if module._compiled_call_impl is None:
                    module._compiled_call_impl = compiled

            self._back.append(call_back)
        original = _original(module)
        if _is_optimized(module):
            original = module._modules["_orig_mod"].__call__  # type: ignore[union-attr,misc,operator]
        if original is not None:
            before, module.forward = module.forward, original  # type: ignore[method-assign]

            def forward_back() -> None:
                if module.__dict__.get("forward") == original:
                    module.forward = before  # type: ignore[method-assign]

            self._back.append(forward_back)

    def step_back(self) -> None:
        """All that has stepped aside runs compiled again."""
        for back in reversed(self._back):
            back()
        self._back.clear()


def _forget(forward: Any) -> bool:
    """Have a forward compiled anew that was compiled from outside of the model, such as by ``torch.compile(step)``.

    The compiler leaves hooks out of what it checks before it runs old code.
    """
    code = getattr(forward, "__code__", None)
    evaluation = sys.modules.get("torch._dynamo.eval_frame")
    entries = getattr(evaluation, "_debug_get_cache_entry_list", None)
    reset = getattr(evaluation, "reset_code", None)
    if code is None or entries is None or reset is None or not entries(code):
        return False
    reset(code)
    return True
