"""Which hooks belong to which group, and which a choice of groups turns on (set semantics)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from flex_model.core.hook_function import HookFunction
from flex_model.errors import GroupError

__all__ = ["ALL", "Groups"]

ALL = "all"


class Groups:
    """Tags of hook functions. Every registered one is in ``all`` and cannot leave it."""

    def __init__(self) -> None:
        self._tags: dict[HookFunction, set[str]] = {}

    def add(self, hook: HookFunction) -> None:
        self._tags[hook] = {ALL}

    def drop(self, hook: HookFunction) -> None:
        self._tags.pop(hook, None)

    def of(self, hook: HookFunction) -> set[str]:
        if hook not in self._tags:
            raise GroupError(f"{hook!r} is in no group, because it is not registered; register it first.")
        return set(self._tags[hook])

    @property
    def names(self) -> list[str]:
        return sorted({ALL}.union(*self._tags.values()))

    def members(self, group: str) -> list[HookFunction]:
        self.check(group)
        return [h for h, tags in self._tags.items() if group in tags]

    def check(self, groups: str | Sequence[str]) -> None:
        known = {ALL}.union(*self._tags.values())
        unknown = [g for g in ([groups] if isinstance(groups, str) else groups) if g not in known]
        if unknown:
            raise GroupError(f"no hook is in the group {unknown[0]!r}; the groups are {', '.join(sorted(known))}.")

    def tag(self, which: HookFunction | str | Iterable[HookFunction], group: str) -> None:
        hooks = self._resolve(which)
        for hook in hooks:
            self._tags[hook].add(group)

    def untag(self, which: HookFunction | str | Iterable[HookFunction], group: str) -> None:
        if group == ALL:
            raise GroupError(
                "the group 'all' holds every hook and cannot be removed; remove the hook instead.", page="group-all"
            )
        self.check(group)
        for hook in self._resolve(which):
            self._tags[hook].discard(group)

    def _resolve(self, which: HookFunction | str | Iterable[HookFunction]) -> list[HookFunction]:
        if isinstance(which, str):
            found = [h for h in self._tags if which in h.module_name]
            if not found:
                raise GroupError(
                    f"no registered hook has {which!r} in its module name; "
                    f"there are hooks on {', '.join(sorted({h.module_name for h in self._tags})) or 'no module'}."
                )
            return found
        hooks = [which] if isinstance(which, HookFunction) else list(which)
        for hook in hooks:
            self.of(hook)
        return hooks

    def chosen(self, groups: str | Sequence[str], complement: bool) -> set[HookFunction]:
        """The union of the groups, or with ``complement`` everything outside that union."""
        groups = [groups] if isinstance(groups, str) else list(groups)
        self.check(groups)
        union = {h for h, tags in self._tags.items() if tags.intersection(groups)}
        return set(self._tags) - union if complement else union
