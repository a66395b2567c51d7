"""``try_edit``: runs an editing function on fake tensors, which have shapes and dtypes and no numbers."""

from __future__ import annotations

import logging
import random
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from flex_model.check.examine import examine
from flex_model.check.findings import CHANGES, Finding, finding
from flex_model.check.source import is_library, target_of
from flex_model.core.bound import Bound, check_expected
from flex_model.core.editing import EditContext, check_answer, refuse_write
from flex_model.core.hook_function import Call, HookFunction, adapt_editing_function
from flex_model.core.in_place import may_write
from flex_model.core.save_ctx import SaveContext
from flex_model.core.trainable import TrainableModules
from flex_model.errors import EditError, FlexModelError, RegistrationError, ShapeError
from flex_model.layout.layout import Layout
from flex_model.routing.selection import Selection
from flex_model.routing.straight import straight_layout

__all__ = ["Trial", "copy_of", "made_of", "try_bound", "try_edit", "try_first", "untouched"]

_NEEDS_NUMBERS = tuple(
    kind
    for name in (
        "DataDependentOutputException",
        "DynamicOutputShapeException",
        "UnsupportedFakeTensorException",
        "UnsupportedOperatorException",
        "UnsupportedMutationAliasingException",
    )
    if (kind := getattr(fake_tensor, name, None)) is not None
)
_NEEDS_MEMORY = ("FakeTensor", "fake tensor", "numpy()", "data pointer", "tensor subclass", "meta tensor", "SymInt")


@dataclass(frozen=True, slots=True)
class Trial:
    """What became of one edit at one site. ``finding``: what is wrong. ``untried``: why nothing can be said."""

    name: str
    hook_type: str
    shape: tuple[int, ...] | None = None
    dtype: torch.dtype | None = None
    finding: Finding | None = None
    untried: str = ""

    @property
    def outcome(self) -> str:
        return "wrong" if self.finding is not None else "not tried" if self.untried else "fits"

    def __str__(self) -> str:
        where = f"{self.name or '(the model)'} ({self.hook_type})"
        value = "" if self.shape is None else f" {self.shape} {str(self.dtype).removeprefix('torch.')}"
        if self.finding is not None:
            return f"{where}{value}: {self.finding}"
        return f"{where}{value}: {self.outcome}" + (f": {self.untried}" if self.untried else "")


def try_edit(
    hook: HookFunction | Callable[..., Any],
    shape: Sequence[int],
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    *,
    save_ctx: Any = None,
    modules: Any = None,
    module: nn.Module | None = None,
) -> Trial:
    """Run one editing function on a fake tensor of a full shape.

    >>> print(try_edit(lambda x: x.mean(-1), (2, 3)).finding.sentence)
    edit (forward): the editing function returned the shape (2,), expected (2, 3); an edit must keep the shape.

    Nothing is computed, and generators, ``save_ctx`` and ``modules`` stay as they were. What the function does to other
    Python objects (a list that it appends to) it does here as well.
    """
    if not isinstance(hook, HookFunction):
        hook = HookFunction("edit", editing_function=hook)
    fn = hook.editing_function
    if fn is None:
        raise RegistrationError(f"{hook!r} has no editing function to try; give it one.")
    adapted = adapt_editing_function(fn, hook.module_name)
    own = modules if isinstance(modules, TrainableModules) else TrainableModules()
    if own is not modules:
        own.update(modules or {})
    bound = Bound(
        hook=hook,
        hook_type="forward",
        name=hook.module_name,
        key=hook.module_name,
        module=module or nn.Identity(),
        edit=adapted.call,
        wants_call=adapted.wants_call,
        may_write=may_write(fn),
        selection=None if hook.select is None else Selection.of(hook.select),
    )
    context = SaveContext()
    for name, value in vars(save_ctx or SaveContext()).items():
        setattr(context, name, value)
    with untouched(context):
        return try_bound(bound, made_of(tuple(shape), dtype, torch.device(device)), context, own)


# -- values ----------------------------------------------------------------------------------------------------
Maker = Callable[[FakeTensorMode], Tensor]


def made_of(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, mesh: Any = None, layout: Layout | None = None
) -> Maker:
    """A fake value; on a mesh, a DTensor of its layout over fake shards."""

    def whole(mode: FakeTensorMode) -> Tensor:
        return _with_graph(torch.empty(shape, dtype=dtype, device=device))

    def in_shards(mode: FakeTensorMode) -> Tensor:
        from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

        assert layout is not None
        placements = straight_layout(layout).placements
        local, _ = compute_local_shape_and_global_offset(shape, mesh, placements)
        stride = torch.empty(shape, device="meta").stride()
        value = _with_graph(torch.empty(local, dtype=dtype, device=device))
        return DTensor.from_local(value, mesh, placements, run_check=False, shape=torch.Size(shape), stride=stride)

    return whole if layout is None or mesh is None else in_shards


def _with_graph(value: Tensor) -> Tensor:
    if torch.is_grad_enabled() and value.is_floating_point():
        return value.requires_grad_() * 1  # not a leaf, as in a model
    return value


def copy_of(value: Tensor) -> Maker:
    """A fake of a value that is there, DTensors included."""
    return lambda mode: _with_graph(mode.from_tensor(value.detach()))


@contextmanager
def _unlogged() -> Iterator[None]:
    """torch logs what a fake operator raises, with its traceback; it is said in the trial."""
    logger = logging.getLogger(fake_tensor.__name__)
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


@contextmanager
def untouched(save_ctx: SaveContext) -> Iterator[None]:
    """Random state and ``save_ctx`` are put back; lists and dicts in it are copies meanwhile."""
    numpy = sys.modules.get("numpy")
    state = random.getstate(), None if numpy is None else numpy.random.get_state()
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    copied = pytree.tree_map(lambda leaf: leaf, save_ctx.snapshot())
    try:
        with torch.random.fork_rng(devices=devices), save_ctx.replayed(copied):
            yield
    finally:
        random.setstate(state[0])
        if numpy is not None:
            numpy.random.set_state(state[1])


class _NoRealWrites(TorchDispatchMode):
    """What is done to real tensors alone is done, with the fake mode as without: here their fakes are written."""

    def __init__(self, mode: FakeTensorMode) -> None:
        super().__init__()
        self.mode = mode

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.is_mutable:
            args, kwargs = pytree.tree_map_only(Tensor, self._fake, (args, dict(kwargs or {})))
        return func(*args, **(kwargs or {}))

    def _fake(self, tensor: Tensor) -> Tensor:
        return self.mode.from_tensor(tensor) if type(tensor) in (Tensor, nn.Parameter) else tensor


# -- one trial -------------------------------------------------------------------------------------------------
def try_bound(
    bound: Bound,
    make: Maker,
    save_ctx: Any,
    modules: TrainableModules,
    call: Call | None = None,
    index: int = 0,
    mesh: Any = None,
) -> Trial:
    """The edit of a registered hook on a fake value, within ``untouched``."""
    shape: tuple[int, ...] | None = None
    dtype = None
    wrong: Finding | None = None
    untried = ""
    with ExitStack() as stack, warnings.catch_warnings(), _unlogged():
        warnings.simplefilter("ignore")
        mode = stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(_NoRealWrites(mode))
        parameters = [mode.from_tensor(t) for t in modules.trainable_tensors()]
        stack.enter_context(modules.replaced(parameters))
        try:
            value = make(mode)
            shape, dtype = tuple(value.shape), value.dtype
            stack.enter_context(modules.as_dtensors(mesh) if isinstance(value, DTensor) else modules.inside_edit())
            wrong = _asked(bound, value, save_ctx, modules, call or Call(0), index)
        except Exception as error:
            wrong, untried = _raised(bound, error)
    return Trial(bound.name, bound.hook_type, shape, dtype, wrong, untried)


def _asked(bound: Bound, full: Tensor, save_ctx: Any, modules: Any, call: Call, index: int) -> Finding | None:
    """What is wrong with the answer, as ``core.editing`` would judge it."""
    assert bound.edit is not None
    line = _line_of(bound)
    if problem := check_expected(bound, full):
        return finding("FM161", problem, line)
    value = full if bound.selection is None else bound.selection.take(full)
    live = value
    if bound.may_write and not isinstance(value, DTensor):
        value = value.clone()
    version = None if value.is_inference() else value._version
    out = bound.edit(bound.module or nn.Identity(), value, save_ctx, modules, bound.site(index), call)
    if value is live and version is not None and value._version != version and not isinstance(value, DTensor):
        try:
            refuse_write(bound)
        except EditError as error:
            return finding("FM131", error.message, line)
    if out is None:
        return None
    if isinstance(full, DTensor) and isinstance(out, Tensor) and not isinstance(out, DTensor):
        sentence = f"{bound.where}: an edit with run='sharded' must return a DTensor, got {type(out).__name__}."
        return finding("FM163", sentence, line)
    try:
        check_answer(bound, value, out)
    except ShapeError as error:
        code = "FM103" if not isinstance(out, Tensor) else "FM161" if out.shape != value.shape else "FM162"
        return finding(code, error.message, line)
    if out.device != value.device:
        sentence = (
            f"{bound.where}: the editing function returned a tensor on {out.device}, expected {value.device}; "
            f"end it with .to(x.device)."
        )
        return finding("FM164", sentence, line)
    return None


def _raised(bound: Bound, error: Exception) -> tuple[Finding | None, str]:
    """(what is wrong, why nothing can be said): what asks for numbers is not wrong."""
    told = error.message if isinstance(error, FlexModelError) else str(error)
    text = (told.strip().splitlines() or [""])[0][:200].rstrip(".")
    place = _place_of(bound, error)
    where = f" at line {place}" if place else ""
    if isinstance(error, (*_NEEDS_NUMBERS, NotImplementedError)):
        return None, f"it asks for the numbers of a tensor{where}"
    if any(word in str(error) for word in _NEEDS_MEMORY):
        return None, f"it asks for the memory of a tensor{where}"
    if isinstance(error, AttributeError) and text.startswith("save_ctx has no"):
        return None, text
    sentence = f"{bound.where}: the editing function raised {type(error).__name__}: {text}{where}."
    return finding("FM163", sentence, place), ""


# -- check mode ------------------------------------------------------------------------------------------------
def try_first(bound: Bound, context: EditContext, full: Tensor, index: int, call: Call) -> None:
    """Before the first time that an edit runs on a tensor: refuse an answer of another shape or dtype.

    Whatever else a trial finds, the run itself will say. What changes Python objects is not tried: it runs once.
    """
    if index in bound.tried or bound.hook.editing_function is None:
        return
    bound.tried.add(index)
    if any(f.code in CHANGES for f in examine(bound.hook.editing_function)):
        return
    mesh = full.device_mesh if isinstance(full, DTensor) else None
    with untouched(context.save_ctx):
        trial = try_bound(bound, copy_of(full), context.save_ctx, context.modules, call, index, mesh)
    if trial.finding is not None and trial.finding.code in ("FM103", "FM161", "FM162"):
        raise ShapeError(trial.finding.sentence, page=trial.finding.code)


def _line_of(bound: Bound) -> int:
    target = None if bound.hook.editing_function is None else target_of(bound.hook.editing_function)
    return 0 if target is None else target.function.__code__.co_firstlineno


def _place_of(bound: Bound, error: Exception) -> int:
    """The last line of the user's own code that the error went through; 0 if there is none."""
    fn = bound.hook.editing_function
    target = None if fn is None else target_of(fn)
    if target is None or is_library(target.function):
        return 0
    file = target.function.__code__.co_filename
    lines = [f.lineno or 0 for f in traceback.extract_tb(error.__traceback__) if f.filename == file]
    return lines[-1] if lines else 0
