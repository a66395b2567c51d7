"""Compiled parts of a model, which step aside while a hook is inside them: what was compiled without it would not run
it, and says nothing. The compiler does not check for hooks before it runs old code."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

__all__ = ["Compiled", "frames_compiled", "is_compiled", "something_is_compiled"]


def is_compiled(module: nn.Module) -> bool:
    """Whether calls of this module run compiled: by ``.compile()``, ``torch.compile`` of it, of its forward, or of what
    calls it."""
    marked = module._compiled_call_impl is not None or _is_optimized(module) or _original(module) is not None
    return marked or _holds_code(module)


def frames_compiled() -> int:
    """How many functions the compiler has met so far."""
    return getattr(sys.modules.get("torch._dynamo.convert_frame"), "FRAME_COUNTER", 0)


def something_is_compiled() -> bool:
    """Whether the compiler holds code for any function: the model's modules may run inside of it."""
    conversion = sys.modules.get("torch._dynamo.convert_frame")
    seen = getattr(getattr(conversion, "input_codes", None), "seen", ())
    return any(_entries(code) for reference in list(seen) if (code := reference()) is not None)


def _is_optimized(module: nn.Module) -> bool:
    return "_orig_mod" in module._modules and "dynamo_ctx" in module.__dict__


def _original(module: nn.Module) -> Callable[..., Any] | None:
    """What was compiled to make this module's forward."""
    forward = module.__dict__.get("forward")
    if getattr(forward, "_torchdynamo_disable", False):
        return None
    found: Callable[..., Any] | None = getattr(forward, "_torchdynamo_orig_callable", None)
    return found


def _holds_code(module: nn.Module) -> bool:
    """Whether the compiler holds code for the forward of this module's class."""
    forward = module.__dict__.get("forward")
    code = getattr(type(module).forward, "__code__", None)
    return not getattr(forward, "_torchdynamo_disable", False) and code is not None and bool(_entries(code))


def _entries(code: Any) -> Any:
    entries = getattr(sys.modules.get("torch._dynamo.eval_frame"), "_debug_get_cache_entry_list", None)
    return () if entries is None else entries(code)


class Compiled:
    """The compiled parts that have stepped aside, and what brings them back."""

    def __init__(self) -> None:
        self._back: list[Callable[[], None]] = []

    def step_aside(self, around: Iterable[nn.Module]) -> None:
        """Let all that is compiled of these modules, which hold hooked ones, run as it is written."""
        if "torch._dynamo" in sys.modules:
            for module in around:
                self._step_aside(module)

    def _step_aside(self, module: nn.Module) -> None:
        compiled = module._compiled_call_impl
        if compiled is not None:
            module._compiled_call_impl = None

            def call_back() -> None:
                if module._compiled_call_impl is None:
                    module._compiled_call_impl = compiled

            self._back.append(call_back)
        if _is_optimized(module):
            self._put(module, module._modules["_orig_mod"].__call__)  # type: ignore[union-attr,misc,operator]
        elif (original := _original(module)) is not None:
            self._put(module, original)
        if _holds_code(module):
            self._put(module, torch.compiler.disable(module.forward))

    def _put(self, module: nn.Module, forward: Any) -> None:
        """``forward`` in the place of the module's own, until it steps back."""
        own = module.__dict__.get("forward")
        module.forward = forward  # type: ignore[method-assign]

        def back() -> None:
            if module.__dict__.get("forward") != forward:
                return  # somebody has put another there
            if own is None:
                del module.__dict__["forward"]
            else:
                module.forward = own  # type: ignore[method-assign]

        self._back.append(back)

    def step_back(self) -> None:
        """All that has stepped aside runs compiled again."""
        for back in reversed(self._back):
            back()
        self._back.clear()
