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
        self._taken: dict[str, tuple[HookType, Any, int]] = {}  # by whom, and how many of them

    def key_for(self, name: str, hook_type: HookType, index: Any) -> str | Site:
        taken = self._taken.get(name)
        return name if taken is None or taken[:2] == (hook_type, index) else Site(name, hook_type, index)

    def take(self, key: str | Site, hook_type: HookType, index: Any) -> None:
        if isinstance(key, str):
            self._taken[key] = (hook_type, index, self._taken.get(key, (hook_type, index, 0))[2] + 1)

    def release(self, key: str | Site) -> None:
        if isinstance(key, str) and key in self._taken:
            hook_type, index, count = self._taken.pop(key)
            if count > 1:
                self._taken[key] = (hook_type, index, count - 1)

    def put(self, key: str | Site, value: Any) -> None:
        self.output.setdefault(key, []).append(value)
