"""The short way on one process: nothing is sharded, so a hook is hardly more than a hand-written one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from flex_model.core.bound import Bound, check_expected
from flex_model.core.call import Staged
from flex_model.core.editing import check_answer, refuse_write
from flex_model.core.ragged import give, identified
from flex_model.errors import ShapeError
from flex_model.routing.memory import LARGE

if TYPE_CHECKING:
    from flex_model.core.firing import Point
    from flex_model.core.runtime import Runtime

__all__ = ["output_hook", "put_all"]

Hook = Callable[[nn.Module, Any, Any], Any]


def put_all(staged: Iterable[Staged]) -> None:
    """Staged values of one process to their sinks: they are whole already. A wrong shape leaves all as it was."""
    staged = list(staged)
    for one in staged:
        if (
            one.bound.hook.expected_shape is not None
            and not one.selected
            and (problem := check_expected(one.bound, one.local))
        ):
            raise ShapeError(problem)
    for one in staged:
        bound = one.bound
        sink = bound.gradient_sink if one.gradient and not bound.is_gradient else bound.sink
        assert sink is not None
        if one.rows:
            give(sink, one.key, identified(one.local, one.rows[0]))
        else:
            sink.put(one.key, one.local)


def output_hook(runtime: Runtime, point: Point, bounds: Sequence[Bound]) -> Hook | None:
    """A hook for the simplest cases, one capture or one edit of a module's only output; None for all others."""
    bound = bounds[0]
    hook = bound.hook
    if (
        runtime.whole.axes
        or len(bounds) > 1
        or bound.is_gradient
        or bound.gradient_sink is not None
        or bound.attached
        or bound.source is not None
        or bound.selection is not None
        or bound.deliver == "shards"
        or hook.unpack_idx not in (0, "all")
        or hook.random
        or bound.may_write
        or runtime.context.check
    ):
        return None
    if bound.edit is None and runtime.on_one_device:
        return _capture(runtime, point, bound)
    if bound.sink is None and bound.edit is not None and not bound.wants_call and hook.expected_shape is None:
        return _edit(runtime, point, bound)
    return None


def _capture(runtime: Runtime, point: Point, bound: Bound) -> Hook:
    key, copies, device = bound.key, runtime.copies, runtime.device
    stays = device is None or runtime.device_of_values == device

    def capture(module: nn.Module, args: Any, output: Any) -> Any:
        call = runtime.fast_call  # None within probes and recomputations
        if call is None or type(output) is not Tensor:
            return point.on_output(module, args, output)
        bound.fired += 1
        small = stays and output.numel() < LARGE // 4  # of float32; the compiler meets this, and knows no nbytes
        call.staged.append(Staged(bound, key, output.detach().clone() if small else copies.take(output, device)))
        return None

    return capture


def _edit(runtime: Runtime, point: Point, bound: Bound) -> Hook:
    edit, save_ctx, modules, site = bound.edit, runtime.save_ctx, runtime.modules, bound.site(0)
    alone = bound.hook.editing_function if bound.takes_value_only else None
    same_size = Tensor.is_same_size
    assert edit is not None

    def change(module: nn.Module, args: Any, output: Any) -> Any:
        call = runtime.fast_call
        if call is None or type(output) is not Tensor or (call.grad_mode and call.checkpointed) or modules.spread:
            return point.on_output(module, args, output)
        version = output._version
        out = alone(output) if alone is not None else edit(module, output, save_ctx, modules, site, None)
        bound.fired += 1
        if output._version != version:
            refuse_write(bound)
        if out is None:
            return None
        try:
            if out.dtype is output.dtype and same_size(out, output):
                return out
        except (AttributeError, TypeError):
            pass  # no tensor: said below
        check_answer(bound, output, out)
        return out

    return change
