"""Where registered hooks put what they capture: the user's ``output_ptr``."""

from __future__ import annotations

from typing import Any

from flex_model.core.hook_function import HookType, Site

__all__ = ["OutputSink"]


class OutputSink:
    """``output_ptr[name]`` is a list, one full tensor a call. The first hook type on a module has the plain name as
    its key, later ones ``Site(name, hook_type, index)``."""

    def __init__(self, output: dict[Any, Any]) -> None:
        self.output = output
        self._taken: dict[str, HookType] = {}

    def key_for(self, name: str, hook_type: HookType, index: Any) -> str | Site:
        if self._taken.setdefault(name, hook_type) == hook_type:
            return name
        return Site(name, hook_type, index)

    def put(self, key: str | Site, value: Any) -> None:
        self.output.setdefault(key, []).append(value)
