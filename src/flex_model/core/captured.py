"""``Captured``: what ``fm.capture`` yields, the full tensors of a block of code by name."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from flex_model.components.place import Place
from flex_model.core.hook_function import Site
from flex_model.core.naming.globs import Pattern, glob_to_regex
from flex_model.core.unfired.missed import Block
from flex_model.errors import DeliveryError, NameNotFoundError
from flex_model.routing.assembly import Parts
from flex_model.routing.rows import Rows

if TYPE_CHECKING:
    from flex_model.show.values import DifferencePicture, ValuesPicture

__all__ = ["Captured", "Ref", "matching"]

Value = Tensor | Parts


class _Calls:
    """A sink: one list of values a key."""

    def __init__(self) -> None:
        self.values: dict[str | Site, list[Any]] = {}
        self.rows: dict[str | Site, dict[int, list[Rows]]] = {}  # by forward of the mixture of experts

    def put(self, key: str | Site, value: Any) -> None:
        self.values.setdefault(key, []).append(value)

    def put_rows(self, key: str | Site, value: Any, tokens: Tensor, experts: Tensor, serial: int) -> None:
        self.put(key, value)
        flat = torch.cat(value.tensors) if isinstance(value, Parts) else value
        if len(flat) == len(tokens):
            calls = self.rows.setdefault(key, {})
            calls.setdefault(serial if serial >= 0 else -1 - len(calls), []).append(Rows(flat, tokens, experts))


@dataclass(frozen=True, eq=False, slots=True)
class Ref:
    """A captured value by name, for an edit."""

    acts: Captured
    key: str | Site
    call: int | None = None

    def __repr__(self) -> str:
        return f"acts.ref({self.key!r}{'' if self.call is None else f', call={self.call}'})"

    def value(self) -> Value:
        return self.acts[self.key] if self.call is None else self.acts.calls(self.key)[self.call]


class Captured(Mapping[str | Site, Value]):
    """Full tensors by name: ``acts[name]`` of its only call, ``acts.calls(name)`` of all, ``acts.grad(name)``.

    Iterating goes over the names that were captured, in the model's order. A name whose layout was refused raises its
    LayoutError when it is asked for; ``acts.refused`` lists them. A module that the model holds under several names is
    found by any of them, and listed once where a glob matched. What ``fm.at`` found is asked for by that place, or by
    its key, such as ``"@z.5.3"``.
    """

    def __init__(self, keys: list[str | Site], elsewhere: str = "", same: Mapping[str, str] | None = None) -> None:
        self._keys = keys
        self._same = same or {}  # {another name of a module: its first name}
        self._empty: dict[str | Site, str] = {}  # what a module gave instead of tensors
        self._values, self._grads = _Calls(), _Calls()
        self._elsewhere = elsewhere
        self.block: Block | None = None  # what knows why something is missing
        self.refused: dict[str | Site, Exception] = {}

    def _held(self, key: str | Site | Place) -> str | Site:
        """The key under which the module of this name is kept."""
        if isinstance(key, Place):
            return key.key
        if key in self._keys or not isinstance(key, str) or not self._same:
            return key
        first = self._same.get(key, key)
        return next((k for k in self._keys if isinstance(k, str) and self._same.get(k, k) == first), key)

    def _of(self, table: _Calls, key: str | Site | Place, what: str) -> list[Value]:
        key = self._held(key)
        if key in self.refused:
            raise self.refused[key]
        found = table.values.get(key)
        if found:
            return found
        asked = key in self._keys or any(isinstance(k, Site) and k.name == key for k in table.values)
        if not asked and not (self._elsewhere and isinstance(key, Site) and key.name in self._keys):
            names = ", ".join(repr(k) for k in self._keys[:5])
            raise NameNotFoundError(
                f"{key!r} was not asked for in this capture, which has {names}; name it there.", page="not-captured"
            )
        if key in self._empty:
            raise DeliveryError(
                f"{key!r} fired, but there is no {what} to capture: {self._empty[key]}.", page="nothing-to-capture"
            )
        missed = "" if self.block is None else self.block.explain(key, what == "gradient")
        if missed:
            raise DeliveryError(f"the {what} of {key!r} has not arrived: {missed}.")
        if self._elsewhere:
            raise DeliveryError(f"the {what} of {key!r} is not here: {self._elsewhere}")
        raise DeliveryError(
            f"the {what} of {key!r} has not arrived: the block has not reached the point where values are delivered "
            f"(the end of the forward or backward, fm.flush(), or the end of the block)."
        )

    def calls(self, key: str | Site | Place) -> list[Value]:
        """All captured values of ``key``, one a call."""
        return list(self._of(self._values, key, "value"))

    def __getitem__(self, key: str | Site | Place) -> Value:
        return _only(self._of(self._values, key, "value"), key, "calls")

    def ref(self, key: str | Site, *, call: int | None = None) -> Ref:
        """A value for an edit of ``flex_model.edits``, looked up when the edit runs.

        >>> with fm.capture("model.layers.3", deliver="local") as acts:                  # doctest: +SKIP
        ...     fm(**clean)
        >>> with fm.edit("model.layers.3", edits.patch(acts.ref("model.layers.3"))):     # doctest: +SKIP
        ...     fm(**corrupted)

        With ``deliver="local"`` every rank puts its own shard beside its own part of the value: nothing moves.
        ``call``: which call, if there are several.
        """
        return Ref(self, key, call)

    def grad(self, key: str | Site | Place) -> Value:
        """The full gradient of the captured value; needs ``grad=True`` and a backward."""
        return _only(self._of(self._grads, key, "gradient"), key, "grads")

    def grads(self, key: str | Site | Place) -> list[Value]:
        """All gradients of ``key``, one a backward, in the order in which they came."""
        return list(self._of(self._grads, key, "gradient"))

    def rows(self, key: str | Site | Place, *, call: int | None = None, grad: bool = False) -> Rows:
        """The value inside a mixture of experts, or its gradient, with the token and the expert of every row.

        On one process such a value is a tensor whose rows lie as the model's code has them, or one for each expert; on
        many it may be ``Parts``. This is the same on all: every row once, sorted by expert and then by token.

        >>> with fm.capture("model.layers.3.mlp.experts.act_fn") as acts:     # doctest: +SKIP
        ...     fm(**inputs)
        >>> rows = acts.rows("model.layers.3.mlp.experts.act_fn")              # doctest: +SKIP
        >>> rows.values[rows.experts == 7].norm(dim=-1)                        # doctest: +SKIP
        >>> torch.zeros(batch * length, width).index_add(0, rows.tokens, rows.values)  # doctest: +SKIP

        ``call``: which forward, if there were several. Raises DeliveryError where no engine knows the rows.
        """
        table, word = (self._grads, "gradient") if grad else (self._values, "value")
        key = self._held(key)
        self._of(table, key, word)
        found = list(table.rows.get(key, {}).values())
        if not found:
            raise DeliveryError(
                f"the rows of {key!r} are not tokens at experts, or no engine can tell which they are; "
                f"take acts[{key!r}] as it is.",
                page="rows-unknown",
            )
        if call is None and len(found) > 1:
            raise DeliveryError(
                f"{key!r} has {len(found)} calls; take one with acts.rows({key!r}, call=0).", page="several-calls"
            )
        pieces = found[call or 0]
        return Rows.sorted(*(torch.cat([getattr(p, f) for p in pieces]) for f in ("values", "tokens", "experts")))

    def __iter__(self) -> Iterator[str | Site]:
        order = {k: i for i, k in enumerate(self._keys)}
        return iter(sorted(self._values.values, key=lambda k: order.get(k, len(order))))

    def __len__(self) -> int:
        return len(self._values.values)

    def stack(self, pattern: Pattern | Place = "**") -> Tensor:
        """The values of all names that match, stacked in the model's order: ``(matches, *value)``."""
        chosen = pattern.keys if isinstance(pattern, Place) else matching(list(self), pattern)
        values = [self[k] for k in chosen]
        if not all(isinstance(v, Tensor) for v in values):
            raise DeliveryError(
                f"{pattern!r} matches values that make no rectangle; take their parts one by one.", page="no-rectangle"
            )
        return torch.stack(values)  # type: ignore[arg-type]

    @overload
    def show(self, pattern: Pattern | Place = "**", *, grad: bool = False) -> ValuesPicture: ...
    @overload
    def show(self, pattern: Pattern | Place = "**", *, against: Captured, grad: bool = False) -> DifferencePicture: ...
    def show(
        self, pattern: Pattern | Place = "**", *, against: Captured | None = None, grad: bool = False
    ) -> ValuesPicture | DifferencePicture:
        """The values, or the gradients, as pictures: a table of statistics, heatmaps, attention, histograms.

        >>> print(acts.show())                                                           # doctest: +SKIP
        >>> acts.show().heatmap("norm", tokens=ids, decode=tokenizer.decode).show()      # doctest: +SKIP
        >>> print(acts.show(against=other))                                              # doctest: +SKIP

        ``against``: another capture; the picture is of the differences, this one minus that. Never collective: it
        shows what is on this rank, and says where the rest went.
        """
        from flex_model.show.values import DifferencePicture, ValuesPicture

        if against is None:
            return ValuesPicture(self, pattern, grad=grad)
        return DifferencePicture(self, against, pattern, grad=grad)

    def save(self, path: str | Path) -> Path:
        """Write all values (and gradients) to one safetensors file; ``name``, ``name#1`` for further calls.

        Names and calls are listed in its metadata. Where nothing was delivered, nothing is written.
        """
        from safetensors.torch import save_file

        path = Path(path)
        flat: dict[str, Tensor] = {}
        for label, table in (("", self._values), ("grad:", self._grads)):
            for key, values in table.values.items():
                for i, value in enumerate(values):
                    name = label + (key if isinstance(key, str) else ":".join(map(str, key))) + (f"#{i}" if i else "")
                    flat.update(_named(name, value))
        if flat:
            names = json.dumps(list(flat))
            save_file(flat, path, metadata={"format": "pt", "flex_model.names": names})
        return path


def _named(name: str, value: Value) -> dict[str, Tensor]:
    if isinstance(value, Parts):
        flat = {f"{name}@{i}": t for i, t in enumerate(value.tensors)}
        flat |= {f"{name}@{i}:tokens": t for i, t in enumerate(value.tokens)}
        flat |= {f"{name}@{i}:experts": t for i, t in enumerate(value.experts)}
        return {n: t.detach().contiguous().cpu().clone() for n, t in flat.items()}
    if isinstance(value, DTensor):
        value = value.to_local()
    return {name: value.detach().contiguous().cpu().clone()}


def matching(keys: Sequence[str | Site], pattern: Pattern | Place) -> list[str | Site]:
    """Those of captured names that match, at least one."""
    chosen = [k for k in keys if (k in pattern.keys if isinstance(pattern, Place) else _matches(k, pattern))]
    if not chosen:
        raise NameNotFoundError(
            f"{pattern!r} matches no captured name; list(acts) has {len(keys)} of them.", page="not-captured"
        )
    return chosen


def _matches(key: str | Site, pattern: Pattern) -> bool:
    name = key.name if isinstance(key, Site) else key
    if callable(pattern):
        return pattern(name)
    patterns = [pattern] if isinstance(pattern, str) else list(pattern)
    return any(name == p or glob_to_regex(p).fullmatch(name) is not None for p in patterns)


def _only(values: list[Value], key: object, others: str) -> Value:
    if len(values) > 1:
        raise DeliveryError(
            f"{key!r} has {len(values)} calls; take them with acts.{others}({key!r}).", page="several-calls"
        )
    return values[0]
