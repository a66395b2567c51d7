"""From what the user asked for to ``Bound`` hooks: what can be wrong is found here, before anything changes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from flex_model.components.heads import Heads
from flex_model.components.place import Place, Spot
from flex_model.core.asked import Asked, asked
from flex_model.core.bound import Bound, Sink
from flex_model.core.captured import Captured
from flex_model.core.hook_function import HOOK_TYPES, HookFunction, HookType, Site, adapt_editing_function
from flex_model.core.in_place import may_write
from flex_model.core.naming.globs import Pattern
from flex_model.errors import RegistrationError
from flex_model.layout.layout import parse_layout
from flex_model.layout.mesh import ModelMesh
from flex_model.routing.item import Deliver
from flex_model.routing.selection import Selection

if TYPE_CHECKING:
    from flex_model.core.runtime import Runtime

__all__ = ["bind", "capture_bounds", "edit_bounds", "on_mesh"]


def bind(
    runtime: Runtime,
    hook: HookFunction,
    hook_type: HookType,
    key: str | Site,
    sink: Sink | None,
    deliver: Deliver,
    *,
    temporary: bool = False,
) -> Bound:
    """A HookFunction on this model. Raises without changing anything if it does not fit."""
    if hook_type not in HOOK_TYPES:
        raise RegistrationError(f"hook_type={hook_type!r} is unknown; expected one of {', '.join(HOOK_TYPES)}.")
    of = "parameter" if hook_type == "tensor" else "module"
    name = runtime.names.clean(hook.module_name, of=of)
    where = f"{name or '(the model)'} ({hook_type})"
    backward = hook_type not in ("forward", "forward_pre")
    if backward and runtime.whole.stage_axis is not None and runtime.engines.no_backward:
        raise RegistrationError(
            f"{where}: there will be no gradient: {runtime.engines.no_backward}; hook the forward instead.",
            page="no-gradient",
        )
    side = "param" if hook_type == "tensor" else "out" if hook_type in ("forward", "full_backward_pre") else "in"
    module = runtime.names.module_of(name, side)
    _check_it_can_fire(runtime, name, hook_type, where)
    edit = None if hook.editing_function is None else adapt_editing_function(hook.editing_function, where)
    if hook.editing_function is not None:
        from flex_model.check.examine import warn_of  # it uses what is here

        warn_of(hook.editing_function, hook.run, hook.random, hook_type)
    axes, override = on_mesh(hook, runtime.mesh, where)
    selection = None if hook.select is None else Selection.of(hook.select)
    return Bound(
        hook=hook,
        hook_type=hook_type,
        name=name,
        key=key,
        module=module,
        sink=sink,
        edit=None if edit is None else edit.call,
        wants_call=edit is not None and edit.wants_call,
        uses_context=edit is not None and edit.uses_context,
        takes_value_only=edit is not None and edit.value_only,
        may_write=hook.editing_function is not None
        and (hook_type not in ("forward", "forward_pre") or may_write(hook.editing_function)),
        alike=fails_alike(runtime, hook, module),
        on_part=_on_part(hook),
        deliver=deliver,
        selection=selection,
        override=override,
        axes=axes,
        source=None if hook_type == "tensor" else runtime.engines.row_source(module),
        temporary=temporary,
        since=runtime.calls,
    )


def fails_alike(runtime: Runtime, hook: HookFunction, module: Any) -> bool:
    """Whether the edit fails on all ranks of the model or on none: all of them make it, and of the same things."""
    everywhere = runtime.whole is runtime.mesh and runtime.engines.row_source(module) is None
    return everywhere and hook.run == "sharded" and getattr(hook.editing_function, "alike", False)


def _on_part(hook: HookFunction) -> Any:
    """The edit of a rank's own part, where that is all it needs."""
    fn, simple = hook.editing_function, hook.select is None and hook.expected_shape is None and not hook.random
    return getattr(fn, "on_part", None) if simple and hook.run == "sharded" and getattr(fn, "by_parts", False) else None


def _check_it_can_fire(runtime: Runtime, name: str, hook_type: HookType, where: str) -> None:
    names = runtime.names
    if hook_type != "tensor":
        if names.never_fires(name):
            raise RegistrationError(
                f"{where}: {names.class_of(name)} has no forward, so it never fires; hook what it holds ('{name}.*').",
                page="never-fires",
            )
        return
    if not names.requires_grad(name):
        raise RegistrationError(
            f"{where}: the parameter does not require a gradient, so it will never have one; "
            f"call requires_grad_(True) on it first.",
            page="no-gradient",
        )
    if name in names.parameters:
        _, site = runtime.engines.gradient_site(*names.parameters[name])
        if site.when == "never":
            raise RegistrationError(f"{where}: no hook can meet this gradient: {site.refusal}.", page="no-gradient")


def on_mesh(hook: HookFunction, mesh: ModelMesh, where: str) -> tuple[tuple[int, ...] | None, tuple[Any, ...]]:
    """``axes=`` and ``layout=`` of a hook by axis index; anew when an engine was applied since."""
    axes = None
    if hook.axes is not None and mesh.axes:
        axes = tuple(mesh.index(a) for a in hook.axes if a in mesh.names or _known_axis(mesh.index, a))
    if hook.run == "one_rank" and axes is not None and len(axes) < len(mesh.axes):
        raise RegistrationError(
            f"{where}: run='one_rank' covers all axes of the mesh; leave out axes={hook.axes}.", page="options-conflict"
        )
    if hook.layout is None:
        return axes, ()
    return axes, tuple(sorted(parse_layout(hook.layout, mesh, where).items(), key=lambda pair: pair[0]))


def _known_axis(index: Any, axis: str) -> bool:
    """Axes that other scripts' meshes have are nothing to unshard here; a misspelt one is an error."""
    if axis in ("dp", "fsdp", "tp", "cp", "ep", "pp", "dp_replicate"):
        return False
    index(axis)
    return True


class _CaptureSink:
    """Values, or gradients, for a capture: it holds the capture's tables and not the capture, which would hold it."""

    def __init__(self, acts: Captured, *, gradients: bool = False) -> None:
        self._table = acts._grads if gradients else acts._values
        self._refused, self._empty = acts.refused, acts._empty

    def put(self, key: str | Site, value: Any) -> None:
        self._table.put(key, value)

    def put_rows(self, key: str | Site, value: Any, tokens: Any, experts: Any, serial: int) -> None:
        self._table.put_rows(key, value, tokens, experts, serial)

    def refuse(self, key: str | Site, error: Exception) -> None:
        self._refused[key] = error

    def empty(self, key: str | Site, reason: str) -> None:
        self._empty[key] = reason


def capture_bounds(
    runtime: Runtime,
    patterns: Sequence[Pattern | Place],
    hook_type: HookType,
    unpack_idx: int | str | Sequence[int | str],
    *,
    select: Any,
    deliver: Deliver,
    grad: bool,
    detach: bool,
    stop: bool,
) -> tuple[list[Bound], Captured, list[Spot]]:
    """The hooks of one ``capture`` block, the object that its values arrive in, and what ``fm.at`` found of them."""
    if deliver not in ("main", "all", "local"):
        raise RegistrationError(f"deliver={deliver!r} is unknown; expected 'main', 'all' or 'local'.")
    if not patterns:
        raise RegistrationError("capture() needs a pattern; '**' captures every module.")
    backward = hook_type in ("full_backward", "full_backward_pre", "tensor")
    if backward and (grad or not detach):
        raise RegistrationError(
            f"grad=True and detach=False go with forward hook types, not with {hook_type!r}.", page="options-conflict"
        )
    if stop and (backward or grad or not detach):
        raise RegistrationError(
            "stop=True ends the forward, so that no gradient comes; take values only, or leave stop=False.",
            page="options-conflict",
        )
    if not detach and runtime.whole.stage_axis is not None:
        raise RegistrationError(
            "detach=False hands out the value's graph, and a pipeline's stages have none in common; take "
            "gradients with grad=True.",
            page="options-conflict",
        )
    if grad and runtime.whole.stage_axis is not None and runtime.engines.no_backward:
        raise RegistrationError(
            f"grad=True: there will be no gradient: {runtime.engines.no_backward}; leave grad=False.",
            page="no-gradient",
        )
    if not detach and deliver != "all":
        raise RegistrationError(
            "detach=False hands out the value on every rank; leave deliver='all'.", page="options-conflict"
        )
    of = "parameter" if hook_type == "tensor" else "module"
    found = asked(runtime.names, patterns, hook_type=hook_type, unpack_idx=unpack_idx, select=select)
    if hook_type == "tensor":
        found = [a for a in found if runtime.names.requires_grad(a.name)] or found
    if grad or not detach:
        _check_gradients(found)
    elsewhere, whole = "", runtime.whole
    if deliver == "main" and not whole.is_main:
        elsewhere = f"deliver='main' sent it to rank {whole.main}, and this is rank {whole.rank}; pass deliver='all'."
    elif deliver == "local" and whole.stage_axis is not None:
        elsewhere = (
            f"deliver='local' leaves it on the ranks of its stage, and rank {whole.rank} is on another; pass 'all'."
        )
    acts = Captured([a.key for a in found], elsewhere, runtime.names.others("module") if of == "module" else {})
    values, gradients = _CaptureSink(acts), _CaptureSink(acts, gradients=True)
    bounds = []
    for one in found:
        hook = HookFunction(one.name, unpack_idx=one.unpack_idx, select=one.select)
        bound = bind(runtime, hook, one.hook_type, one.key, values, deliver, temporary=True)
        bounds.append(replace(bound, attached=not detach, gradient_sink=gradients if grad else None))
    return bounds, acts, [a.spot for a in found if a.spot is not None]


def _check_gradients(found: Sequence[Asked]) -> None:
    for one in found:
        if one.spot is not None and one.spot.read_only:
            raise RegistrationError(
                f"{one.key!r} has no gradient of its own at {one.name!r}: {one.spot.read_only}.", page="read-only"
            )


def edit_bounds(
    runtime: Runtime,
    pattern: Pattern | Place,
    editing_function: Callable[..., Any],
    hook_type: HookType,
    keywords: Mapping[str, Any],
    sink: Sink,
    deliver: Deliver,
) -> tuple[list[Bound], list[Spot]]:
    """The hooks of one ``edit`` block, once a firing whatever number of names a module has."""
    found = asked(
        runtime.names,
        [pattern],
        hook_type=hook_type,
        unpack_idx=keywords.get("unpack_idx", 0),
        select=keywords.get("select"),
    )
    others = runtime.names.others("parameter" if hook_type == "tensor" else "module")
    once = {a.key if a.spot is not None else others.get(a.name, a.name): a for a in found}
    bounds = []
    for one in once.values():
        if one.spot is not None:
            _check_edit(one.spot, keywords)
        own = {**keywords, "unpack_idx": one.unpack_idx, "select": one.select}
        hook = HookFunction(one.name, editing_function=editing_function, **own)
        bounds.append(
            bind(runtime, hook, one.hook_type, one.key, sink if hook.capture else None, deliver, temporary=True)
        )
    return bounds, [a.spot for a in once.values() if a.spot is not None]


def _some_heads(spot: Spot) -> bool:
    return isinstance(spot.select, Heads) and not spot.select.whole


def _check_edit(spot: Spot, keywords: Mapping[str, Any]) -> None:
    if spot.read_only:
        raise RegistrationError(f"{spot.key!r} cannot be edited at {spot.name!r}: {spot.read_only}.", page="read-only")
    if keywords.get("run") == "sharded" and _some_heads(spot):
        raise RegistrationError(
            f"{spot.key!r}: run='sharded' gives an edit all heads of an unfused projection; leave head= out there, or "
            f"leave run='every_rank'.",
            page="options-conflict",
        )
