"""Generators of fuzz cases, for Hypothesis: nets, value trees, engines, batches, hooks, and the order of it all."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import fuzz_edits
import fuzz_models
import torch
from fuzz_case import Case, Hook, Round
from fuzz_models import Scene, Spec
from hypothesis import strategies as st
from torch import Tensor, nn

DATA = {"ddp": 2, "fsdp2": 2, "fsdp1_orig": 2, "ddp_tp": 2, "2d_tp": 2, "2d_sp": 2, "hsdp": 4}  # ranks along data axes
AXES = {
    "solo": ("dp", "tp"),
    "ddp": ("dp",),
    "fsdp1_orig": ("fsdp",),
    "fsdp2": ("fsdp",),
    "hsdp": ("dp_replicate", "fsdp"),
    "ddp_tp": ("dp", "tp"),
    "2d_tp": ("dp", "tp"),
    "2d_sp": ("dp", "tp"),
    "tp": ("tp",),
    "tp_dtensors": ("tp",),
    "sp": ("tp",),
}
WORLDS = {1: ("solo",), 2: ("ddp", "fsdp2", "tp", "tp_dtensors", "sp"), 4: ("ddp_tp", "2d_tp", "2d_sp", "hsdp")}


# -- nets ------------------------------------------------------------------------------------------------------
def specs(draw: st.DrawFn, kinds: tuple[str, ...], *, main: bool = True) -> Spec:
    """A tree with kinds of tensors in it, the main one among them if there must be one."""
    spec = ("x",) if draw(st.booleans()) else _spec(draw, kinds, depth=3)
    return spec if not main or "x" in fuzz_models.kinds(spec) else ("tuple", spec, ("x",))


CONSTANTS = (None, 3, "text", True, 2.5, ())
NODES = st.sampled_from(["leaf", "leaf", "leaf", "tuple", "list", "dict", "data", "pair", "const"])


def _spec(draw: st.DrawFn, kinds: tuple[str, ...], depth: int) -> Spec:
    head = draw(NODES) if depth < 3 else draw(st.sampled_from(["tuple", "list", "dict", "data", "pair"]))
    if head == "const" or (head != "leaf" and not depth):
        return ("const", draw(st.sampled_from(CONSTANTS)))
    if head == "leaf":
        return (draw(st.sampled_from(kinds)),)
    count = 2 if head in ("data", "pair") else draw(st.integers(1, 3))
    inner = [_spec(draw, kinds, depth - 1) for _ in range(count)]
    if head == "dict":
        return ("dict", *zip(draw(st.permutations(["hidden", "a", "z"])), inner, strict=False))
    return (head, *inner)


def allowed_kinds(engine: str) -> tuple[str, ...]:
    # Under sequence parallelism a net that means over positions, or views them with the batch, would be another net.
    return tuple(k for k in fuzz_models.KINDS if not ("sp" in engine.split("_") and k in ("column", "flat", "sum")))


@st.composite
def scenes(draw: st.DrawFn, engines: tuple[str, ...]) -> Scene:
    engine = draw(st.sampled_from(engines))
    sequence = engine in ("sp", "2d_sp")
    kinds = allowed_kinds(engine)
    value = specs(draw, kinds)
    named = specs(draw, kinds, main=False) if draw(st.booleans()) else None
    recompute = draw(st.sampled_from(["", "", "plain", "reentrant"]))
    if recompute == "reentrant" and (value != ("x",) or named is not None):
        recompute = "plain"  # torch's reentrant kind sees tensors among the arguments only
    repeat = draw(st.sampled_from([1, 1, 1, 2]))
    if engine in DATA and recompute == "reentrant":
        repeat = 1  # reducers take one recomputation of a parameter's module, without any hooks as well
    uneven = engine in ("solo", "ddp", "fsdp2", "tp_dtensors")
    tensor = engine not in ("solo", "ddp", "fsdp2", "hsdp")  # of new shapes DTensor thinks for long
    rough = {"signs", "mask"}.isdisjoint(fuzz_models.kinds(("tuple", value, *([named] if named else []))))
    return Scene(
        engine=engine,
        width=draw(st.sampled_from([4, 8] if tensor else [4, 8, 3])),  # of two elements a LayerNorm makes 1 and -1
        hidden=draw(st.sampled_from(([8, 5] if tensor else [4, 8, 16, 5, 7]) if uneven else [8, 16])),
        vocabulary=8 if tensor else draw(st.sampled_from([8, 12, 16])),
        layers=draw(st.sampled_from([1, 1, 2])),
        repeat=repeat,
        value=value,
        named=named,
        output=None if sequence or draw(st.booleans()) else specs(draw, kinds, main=False),
        floats=not sequence and draw(st.booleans()),
        recompute=recompute,
        dtype=draw(st.sampled_from(["float64", "float64", "float32", "bfloat16" if rough else "float64"])),
        batches=tuple(draw(st.lists(st.integers(1, 3), min_size=(n := DATA.get(engine, 1)), max_size=n))),
        length=draw(st.sampled_from([2, 4] if sequence else [1, 3, 4] if tensor else [1, 2, 3, 4, 5])),
        shift=not sequence and draw(st.booleans()),
    )


# -- what can be hooked ----------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Place:
    """One side of a module: (path, shape, whether it is floating point) of its tensors."""

    name: str
    side: str
    leaves: tuple[tuple[str, tuple[int, ...], bool], ...]


@lru_cache(maxsize=4096)
def places(scene: Scene) -> tuple[tuple[Place, ...], tuple[tuple[str, tuple[int, ...]], ...]]:
    """(modules' sides, parameters) of a net."""
    net = fuzz_models.make(replace(scene, recompute="", dtype="float32"))
    found: dict[tuple[str, str], Place] = {}

    def note(name: str, side: str, leaves: list[tuple[str, Tensor]]) -> None:
        told = tuple((path, tuple(t.shape), t.is_floating_point()) for path, t in leaves)
        found.setdefault((name, side), Place(name, side, told))

    for name, module in net.named_modules():

        def before(m: nn.Module, args: Any, kwargs: Any, name: str = name) -> None:
            note(name, "in", fuzz_models.input_leaves(m, args, kwargs))

        def after(m: nn.Module, args: Any, output: Any, name: str = name) -> None:
            note(name, "out", fuzz_models.leaves(output))

        module.register_forward_pre_hook(before, with_kwargs=True)
        module.register_forward_hook(after)
    ids, more = fuzz_models.inputs(replace(scene, dtype="float32"), 0)
    with torch.no_grad():
        net(ids) if more is None else net(ids, more)
    parameters = tuple((n, tuple(p.shape)) for n, p in net.named_parameters())
    return tuple(p for p in found.values() if p.leaves), parameters


# -- hooks -----------------------------------------------------------------------------------------------------
@st.composite
def selects(draw: st.DrawFn, shape: tuple[int, ...]) -> Any:
    """Part of a value of this shape, never empty."""
    if draw(st.booleans()):
        return ("function", draw(st.sampled_from(list(fuzz_edits.FUNCTIONS))))
    entries: list[Any] = []
    for size in shape[: draw(st.integers(1, len(shape)))]:
        entries.append(draw(st.one_of(st.just(("slice", None, None, None)), _entries(size))))
    lists = [e for e in entries if isinstance(e, tuple) and e[0] in ("list", "tensor")]
    if len(lists) > 1:  # torch broadcasts them together
        entries = [("slice", None, None, None) if e in lists[1:] else e for e in entries]
    if len(entries) < len(shape) and draw(st.booleans()):
        entries = ["...", *entries[: len(shape) - 1]] if len(entries) == 1 else entries
        if entries[0] == "...":
            entries[1] = draw(_entries(shape[-1]))
    return ("index", entries[0] if len(entries) == 1 and draw(st.booleans()) else tuple(entries))


def _entries(size: int) -> st.SearchStrategy[Any]:
    place = st.integers(-size, size - 1)
    starts = st.tuples(st.none() | st.integers(-size, size - 1), st.none() | st.just(size + 3) | st.integers(1, size))
    slices = st.tuples(starts, st.sampled_from([None, 1, 2])).map(lambda p: ("slice", *p[0], p[1]))
    full = slices.filter(lambda s: len(range(size)[slice(*s[1:])]) > 0)
    many = st.lists(place, min_size=1, max_size=3, unique_by=lambda i: i % size)
    return st.one_of(place, full, many.map(lambda i: ("list", *i)), many.map(lambda i: ("tensor", *i)))


@st.composite
def indices(draw: st.DrawFn, place: Place) -> Any:
    """An ``unpack_idx`` that names something there."""
    count, paths = len(place.leaves), [p for p, _, _ in place.leaves if p]
    heads = [p.rpartition(".")[0] for p in paths if "." in p]
    one: st.SearchStrategy[Any] = st.integers(-count, count - 1)
    if paths:
        one = one | st.sampled_from(paths + heads)
    several = st.lists(st.integers(0, count - 1), min_size=1, max_size=3, unique=True).map(tuple)
    return draw(st.one_of(st.just(0), one, one, st.just("all"), several))


def _named(place: Place, idx: Any) -> list[tuple[str, tuple[int, ...], bool]]:
    from fuzz_case import choose

    leaves = list(place.leaves)
    found = choose([(path, None) for path, _, _ in leaves], idx)  # type: ignore[misc]
    return [leaves[i] for i in found]


@st.composite
def hooks(draw: st.DrawFn, scene: Scene, rounds: int, near: tuple[str, str]) -> Hook:
    """A hook anywhere, often where another one is (``near``: its name and side)."""
    sides, parameters = places(scene)
    via = draw(st.sampled_from(["capture", "edit", "register"]))
    first = draw(st.integers(0, rounds - 1))
    span = (first, draw(st.integers(first, rounds - 1)))
    groups = tuple(draw(st.lists(st.sampled_from(["probes", "others"]), max_size=2, unique=True)))
    groups = groups if via == "register" else ()
    if draw(st.integers(0, 7)) == 0:
        name, shape = draw(st.sampled_from(parameters))
        select = draw(st.none() | st.none() | selects(shape)) if draw(st.booleans()) else None
        edit = draw(_edits([(shape, True)], select, "tensor")) if via != "capture" else ""
        return Hook(name, "tensor", via, 0, select, edit, deliver=draw(_deliver(via)), groups=groups, rounds=span)
    there = [p for p in sides if (p.name, p.side) == near]
    place = there[0] if there and draw(st.booleans()) else draw(st.sampled_from(sides))
    idx = draw(indices(place))
    found = _named(place, idx)
    forward, backward = ("forward", "full_backward_pre") if place.side == "out" else ("forward_pre", "full_backward")
    kind = draw(st.sampled_from([forward, forward, backward]))
    ranked = [s for _, s, _ in found if s]
    shape = min(ranked, key=len, default=())
    select = None
    if shape and len(ranked) == len(found) and len({s for _, s, _ in found}) == 1 and draw(st.integers(0, 2)) == 0:
        select = draw(selects(shape))
    edit, run, axes = "", "every_rank", None
    if via == "edit" or (via == "register" and draw(st.booleans())):
        edit = draw(_edits([(s, f) for _, s, f in found], select, kind))
    if edit:
        run = draw(st.sampled_from(["every_rank", "every_rank", "one_rank", "sharded"]))
        if run == "sharded" and edit == "random" and draw(st.integers(0, 3)):
            run = "one_rank"  # refused, which need not be seen so often
        if run == "sharded" and (edit in fuzz_edits.IN_PLACE or select is not None):  # torch cannot put parts back
            run = "every_rank"
        if run == "one_rank" and edit in ("saves", "uses saved"):
            run = "every_rank"
        if run != "one_rank" and select is None and edit in fuzz_edits.EVERYWHERE and draw(st.booleans()):
            axes = tuple(draw(st.lists(st.sampled_from(AXES[scene.engine]), max_size=1)))
    grad = via == "capture" and kind in ("forward", "forward_pre") and draw(st.booleans())
    deliver = draw(_deliver(via))
    if deliver == "local" and select is not None and draw(st.integers(0, 3)):
        deliver = "all"  # nor this
    floats = len(found) == 1 and found[0][2]
    attached = via == "capture" and kind in ("forward", "forward_pre") and floats and not scene.recompute
    attached = attached and draw(st.integers(0, 4)) == 0
    return Hook(name=place.name, kind=kind, via=via, idx=idx, select=select, edit=edit, run=run, axes=axes,
                deliver="all" if attached else deliver, grad=grad and not attached, groups=groups, rounds=span,
                attached=attached)  # fmt: skip


def _deliver(via: str) -> st.SearchStrategy[str]:
    return st.sampled_from(["all", "all", "main", "local"]) if via == "capture" else st.just("all")


def _edits(leaves: list[tuple[tuple[int, ...], bool]], select: Any, kind: str) -> st.SearchStrategy[str]:
    shapes = [fuzz_edits.take(select, torch.empty(s)).shape for s, _ in leaves]
    if not all(fuzz_edits.can_write(select, s) for s, _ in leaves):
        return st.sampled_from(["nothing"])
    names = [*fuzz_edits.EVERYWHERE, "odd calls", "random"]
    if all(shapes):
        names += [*fuzz_edits.LAST, *fuzz_edits.WHOLE]
    if kind in ("forward", "forward_pre"):
        names += ["trainable", "trainable", "saves", "uses saved"]
    return st.sampled_from(names)


# -- cases -----------------------------------------------------------------------------------------------------
@st.composite
def rounds(draw: st.DrawFn, scene: Scene) -> Round:
    backward = draw(st.sampled_from(["each", "each", "each", "together", "reversed", ""]))
    if backward == "reversed" and "solo" not in scene.engine and scene.engine not in ("tp", "tp_dtensors", "sp"):
        backward = "together"  # a reducer takes one backward a forward
    return Round(
        forwards=draw(st.sampled_from([1, 1, 2])),
        backward=backward,
        keep=draw(st.booleans()),
    )


@st.composite
def cases(draw: st.DrawFn, engines: tuple[str, ...]) -> Case:
    scene = draw(scenes(engines))
    several = tuple(draw(st.lists(rounds(scene), min_size=1, max_size=3)))
    placed: list[Hook] = []
    for _ in range(draw(st.integers(1, 4))):
        placed.append(draw(hooks(scene, len(several), (placed[-1].name, placed[-1].side) if placed else ("", ""))))
    case = Case(scene, tuple(placed), several, draw(st.sampled_from(["all", "main", "local"])), draw(st.booleans()))
    if scene.recompute == "reentrant" and (scene.repeat > 1 or any(r.backward == "together" for r in case.rounds)):
        # every use of a parameter has a backward, and a gradient, of its own there: with torch's hooks, too
        case = replace(case, hooks=tuple(h for h in case.hooks if h.kind != "tensor") or (Hook("norm"),))
    case = replace(case, rounds=tuple(draw(_with_groups(case, i)) for i in range(len(several))))
    parameters = [h for h in case.hooks if h.kind == "tensor"]
    if scene.engine in DATA and scene.recompute == "reentrant":
        once = {"together": "each"}
        case = replace(case, rounds=tuple(replace(r, backward=once.get(r.backward, r.backward)) for r in case.rounds))
    if (
        scene.engine == "ddp_tp"
    ):  # torch forgets its parameters in a forward, and what they are in one without gradients
        case = replace(case, bitwise=False)
        case = replace(case, rounds=tuple(replace(r, backward=r.backward or "each") for r in case.rounds))
    if any(h.edit in ("random", "odd calls") for h in parameters):  # of which call is the gradient of several?
        case = replace(case, rounds=tuple(replace(r, forwards=1) for r in case.rounds))
    if parameters:  # a parameter's gradient comes after the call, when the choice of groups for it is over
        case = replace(case, rounds=tuple(replace(r, in_call=False) for r in case.rounds))
    return case


@st.composite
def _with_groups(draw: st.DrawFn, case: Case, number: int) -> Round:
    """The round with a choice among the groups that there are then."""
    tags = {"all", *(g for _, h in case.at(number) if h.via == "register" for g in h.groups)}
    if draw(st.booleans()):
        return case.rounds[number]
    chosen = tuple(draw(st.lists(st.sampled_from(sorted(tags)), min_size=1, max_size=2, unique=True)))
    return replace(case.rounds[number], groups=chosen, complement=draw(st.booleans()), in_call=draw(st.booleans()))
