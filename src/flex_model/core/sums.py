"""Whether a residual stream is where ``fm.at`` found it: the sums that must hold, in the model's first forward.

Looked at are the values of this rank by plain torch hooks, once a layer; nothing moves. Sums hold on shards as on the
whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from flex_model.components.place import Spot, Sum
from flex_model.core.call import in_backward
from flex_model.errors import ComponentError
from flex_model.trees import first_tensor

if TYPE_CHECKING:
    from flex_model.core.runtime import Runtime

__all__ = ["SumWatch", "watched_sums"]


@contextmanager
def watched_sums(runtime: Runtime, spots: Sequence[Spot], refused: MutableMapping[Any, Exception]) -> Iterator[None]:
    """Put an error under the key of every spot whose layer turns out to be something else."""
    sums = {s.sum: [o.key for o in spots if o.sum == s.sum] for s in spots if s.sum is not None}
    new = [s for s in sums if s not in runtime.sums_hold and not runtime.names.compiled]

    def wrong(of: Sum, error: ComponentError) -> None:
        for key in sums[of]:
            refused[key] = error

    watches = [SumWatch(runtime, s, wrong) for s in new]
    runtime.sum_watches += watches
    try:
        for watch in watches:
            watch.put_on()
        yield
    finally:
        runtime.sum_watches = [w for w in runtime.sum_watches if w not in watches]
        for watch in watches:
            watch.remove()


class SumWatch:
    """The hooks on one layer, until its sums have been seen."""

    def __init__(self, runtime: Runtime, of: Sum, wrong: Callable[[Sum, ComponentError], None]) -> None:
        self.runtime, self.of, self.wrong = runtime, of, wrong
        self.values: dict[str, Tensor | None] = {}
        self.handles: list[Any] = []
        self.layer: nn.Module | None = None  # that is looked at

    def put_on(self) -> None:
        """Anew, behind the hooks that are on: edits of what is added have been made when it is looked at, those of the
        sums have not."""
        of, names = self.of, self.runtime.names
        self.remove()
        if of in self.runtime.sums_hold:
            return
        layer, attn, mlp = (names.module_of(n, "out") for n in (of.layer, of.attn, of.mlp))
        mid = None if of.mid is None else names.module_of(of.mid, "in")
        if layer is None or attn is None or mlp is None or (mid is None and of.mid is not None):
            return  # on another stage
        self.layer = layer
        self.handles.append(layer.register_forward_pre_hook(self._begin, with_kwargs=True))
        self.handles.append(attn.register_forward_hook(self._output("attn")))
        self.handles.append(mlp.register_forward_hook(self._output("mlp")))
        if mid is not None:
            self.handles.append(mid.register_forward_pre_hook(self._middle, prepend=True, with_kwargs=True))
        self.handles.append(layer.register_forward_hook(self._end, prepend=True))

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles.clear()
        self.values.clear()
        self.layer = None

    def _keep(self, part: str, value: Any) -> None:
        tensor = None if self.runtime.quiet or in_backward() != -1 else first_tensor(value)
        self.values[part] = None if tensor is None or tensor.is_meta else tensor.detach().clone()

    def _begin(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self.values.clear()
        self._keep("pre", (args, kwargs))

    def _middle(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self._keep("mid", (args, kwargs))

    def _output(self, part: str) -> Callable[[nn.Module, Any, Any], None]:
        return lambda module, args, output: self._keep(part, output)

    def _end(self, module: nn.Module, args: Any, output: Any) -> None:
        self._keep("post", output)
        found = {k: v for k, v in self.values.items() if v is not None}
        self.values.clear()
        if len(found) < (4 if self.of.mid is None else 5):
            return
        with torch.no_grad():
            problem = _problem(found)
        if problem is None:
            return
        if not problem:
            self.runtime.sums_hold.add(self.of)
            self.remove()
        elif not module.training:  # there dropout may come between
            self.wrong(self.of, ComponentError(self._told(problem), page="residual-differs"))

    def _told(self, problem: str) -> str:
        given = f"'attn_out' is looked for at {self.of.attn!r} and 'mlp_out' at {self.of.mlp!r}"
        return f"{self.of.layer}: {problem}, so that this layer has another structure than the names say; {given}."


def _problem(found: dict[str, Tensor]) -> str | None:
    """What does not hold; empty if all holds, None if these values do not tell."""
    if any(isinstance(v, DTensor) for v in found.values()):
        if len({v.placements if isinstance(v, DTensor) else None for v in found.values()}) > 1:
            return None
        found = {k: v.to_local() for k, v in found.items() if isinstance(v, DTensor)}
    pre, attn, mlp, post = (found[k] for k in ("pre", "attn", "mlp", "post"))
    if "mid" not in found:
        return _differs("resid_pre + attn_out + mlp_out", [pre, attn, mlp], "resid_post", post)
    first = _differs("resid_pre + attn_out", [pre, attn], "resid_mid", found["mid"])
    second = _differs("resid_mid + mlp_out", [found["mid"], mlp], "resid_post", post)
    return first or second or (None if first is None or second is None else "")


def _differs(of: str, parts: Sequence[Tensor], what: str, whole: Tensor) -> str | None:
    if any(p.numel() != whole.numel() for p in parts):
        shapes = ", ".join(str(tuple(p.shape)) for p in parts)
        return f"{of} have shapes {shapes}, and {what} {tuple(whole.shape)}"
    rows, full = [p.reshape(whole.shape).double() for p in parts], whole.double()  # OPT's MLP has flattened rows
    off = (torch.stack(rows).sum(0) - full).abs()
    if not bool(off.isfinite().all()):
        return None
    rounding = 2 * torch.finfo(whole.dtype).eps * torch.stack(rows).abs().sum(0)
    if _share(off <= rounding) > 0.99:
        return "" if all(_share(r.abs() > rounding) > 0.25 for r in rows) else None
    return f"{of} is not {what} (off by {float(off.norm() / full.norm().clamp_min(1e-30)):.1%})"


def _share(true: Tensor) -> float:
    return float(true.double().mean())
