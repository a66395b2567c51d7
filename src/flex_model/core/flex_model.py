"""``FlexModel``: the wrapper users meet."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.utils.hooks import RemovableHandle

from flex_model.components.finder import Finder, Layers
from flex_model.components.place import Place
from flex_model.core.around import capturing, editing
from flex_model.core.block import hooks_on
from flex_model.core.bound import Bound, check_expected
from flex_model.core.captured import Captured
from flex_model.core.groups import ALL
from flex_model.core.harvesting import Harvesting
from flex_model.core.hook_function import HOOK_TYPES, HookFunction, HookType
from flex_model.core.installed import Installed
from flex_model.core.naming.globs import Pattern
from flex_model.core.register import bind, capture_bounds, edit_bounds
from flex_model.core.reporting import Reporting
from flex_model.core.runtime import Runtime
from flex_model.core.sinks import OutputSink
from flex_model.core.stopping import Stop
from flex_model.core.whole import full_batch, full_output, full_parameter, whole_module
from flex_model.core.wrapping import check_sizes, largest_mesh, plain_keys, with_signature_of, wrapped_keys
from flex_model.errors import RegistrationError, ShapeError
from flex_model.routing.item import Deliver

__all__ = ["FlexModel"]

Which = HookFunction | str | Iterable[HookFunction]


class FlexModel(Harvesting, Reporting, nn.Module):
    """Wraps any ``nn.Module`` and gives hooks the full, unsharded tensors, whatever the parallelism underneath.

    >>> fm = FlexModel(torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU()))
    >>> with fm.capture("1") as acts:
    ...     _ = fm(torch.ones(2, 4))
    >>> acts["1"].shape
    torch.Size([2, 8])

    ``output_ptr`` is a dict that registered hooks fill: ``output_ptr[name]`` is a list, one full tensor a call, on the
    lowest rank unless ``deliver`` says otherwise. Sizes and ``mesh`` need not be given; given, they are checked.

    Args: ``deliver``: "main", "all" or "local". ``device``: where captures are kept, None for where they are.
    ``data_reduction``: how the engine reduces gradients over data axes, "mean" or "sum". ``timeout``: of this library's
    own collectives. ``names``: {name on this rank: the plain model's name}, of pipeline stages that are sliced so that
    their modules are counted anew.
    """

    def __init__(
        self,
        module: nn.Module,
        output_ptr: dict[Any, Any] | None = None,
        tensor_parallel_size: int | None = None,
        pipeline_parallel_size: int | None = None,
        data_parallel_size: int | None = None,
        process_group: dist.ProcessGroup | None = None,
        *,
        mesh: DeviceMesh | None = None,
        deliver: Deliver = "main",
        device: str | torch.device | None = "cpu",
        data_reduction: str = "mean",
        timeout: timedelta = timedelta(minutes=10),
        names: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__()
        if deliver not in ("main", "all", "local"):
            raise RegistrationError(f"deliver={deliver!r} is unknown; expected 'main', 'all' or 'local'.")
        if data_reduction not in ("mean", "sum"):
            raise RegistrationError(f"data_reduction={data_reduction!r} is unknown; expected 'mean' or 'sum'.")
        runtime = Runtime(
            module,
            mesh=mesh,
            device=None if device is None else torch.device(device),
            mean=data_reduction == "mean",
            timeout=timeout,
            renamed=dict(names or {}),
        )
        check_sizes(runtime, tensor_parallel_size, pipeline_parallel_size, data_parallel_size, process_group)
        self.module = module
        self.trainable_modules = runtime.modules
        self.output_ptr: dict[Any, Any] = {} if output_ptr is None else output_ptr
        self._runtime = runtime
        self._deliver: Deliver = deliver
        self._sink = OutputSink(self.output_ptr)
        self._chosen: tuple[str | Sequence[str], bool] = (ALL, False)
        self._finalizer = weakref.finalize(self, Installed.take_off, runtime.installed)
        self.training = module.training
        # a class of its own, because trainers read the signature off the class, too
        self.__class__ = with_signature_of(module, type(self))  # type: ignore[assignment]
        runtime.wrapped_by(self)
        self._register_state_dict_hook(plain_keys)
        self.register_load_state_dict_pre_hook(wrapped_keys)

    # -- running -----------------------------------------------------------------------------------------------
    def _forward(self, *args: Any, groups: str | Sequence[str] = ALL, complement: bool = False, **kwargs: Any) -> Any:
        if groups == ALL and not complement:
            return self._run(*args, **kwargs)
        with self.groups(groups, complement=complement):
            return self._run(*args, **kwargs)

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        runtime = self._runtime
        outer = runtime.active  # a hook may call the model
        before, runtime.direct = runtime.direct, any(b.enabled for b in runtime.bounds)
        runtime.last_inputs = (args, kwargs) if runtime.whole.axes else ((), {})
        try:
            if runtime.direct:
                runtime.installed.compiled_late()
            output = self.module(*args, **kwargs)
            return None if runtime.stopping.cut else output
        except Stop:
            runtime.stopping.over()
            return None
        finally:
            runtime.direct, runtime.stopping.cut = before, False
            if runtime.active not in (None, outer) and not runtime.quiet:  # torch runs no hook after KeyboardInterrupt
                runtime.abandon(sys.exc_info()[1])

    @property
    def save_ctx(self) -> Any:
        """The namespace that editing functions share."""
        return self._runtime.save_ctx

    @property
    def seed(self) -> int:
        """The seed of edits with ``random=True``; the same on every rank."""
        return self._runtime.seed

    @seed.setter
    def seed(self, value: int) -> None:
        self._runtime.seed = self._runtime.context.seed = value

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in ("module", "_runtime"):
                raise
            module = super().__getattr__("module")
            return getattr(module if hasattr(module, name) else self._runtime.root, name)

    # -- registering -------------------------------------------------------------------------------------------
    def register_forward_hook(  # type: ignore[override]
        self, hook_function: HookFunction | Callable[..., Any], **keywords: Any
    ) -> RemovableHandle:
        """Hook a module's output. Returns a handle whose ``remove()`` takes the hook off.

        Plain functions, which other libraries put on any module, go to ``nn.Module``'s own method, here and below.
        """
        if not isinstance(hook_function, HookFunction):
            return super().register_forward_hook(hook_function, **keywords)
        return self._register(hook_function, "forward")

    def register_forward_pre_hook(  # type: ignore[override]
        self, hook_function: HookFunction | Callable[..., Any], **keywords: Any
    ) -> RemovableHandle:
        """Hook a module's input."""
        if not isinstance(hook_function, HookFunction):
            return super().register_forward_pre_hook(hook_function, **keywords)
        return self._register(hook_function, "forward_pre")

    def register_full_backward_hook(  # type: ignore[override]
        self, hook_function: HookFunction | Callable[..., Any], **keywords: Any
    ) -> RemovableHandle:
        """Hook the gradient of a module's input."""
        if not isinstance(hook_function, HookFunction):
            return super().register_full_backward_hook(hook_function, **keywords)
        return self._register(hook_function, "full_backward")

    def register_full_backward_pre_hook(  # type: ignore[override]
        self, hook_function: HookFunction | Callable[..., Any], **keywords: Any
    ) -> RemovableHandle:
        """Hook the gradient of a module's output."""
        if not isinstance(hook_function, HookFunction):
            return super().register_full_backward_pre_hook(hook_function, **keywords)
        return self._register(hook_function, "full_backward_pre")

    def register_hook(self, hook_function: HookFunction) -> RemovableHandle:
        """Hook the gradient of a parameter; ``module_name`` is the parameter's name."""
        return self._register(hook_function, "tensor")

    def _register(self, hook: HookFunction, hook_type: HookType) -> RemovableHandle:
        runtime = self._runtime
        runtime.look()
        if any(b.hook is hook for b in runtime.bounds):
            raise RegistrationError(
                f"{hook!r} is registered already; make another HookFunction for another place.", page="registered-twice"
            )
        key = self._sink.key_for(hook.module_name, hook_type, hook.unpack_idx)
        bound = bind(runtime, hook, hook_type, key, self._sink if hook.capture else None, self._deliver)
        if bound.sink is not None:
            self._sink.take(key, hook_type, hook.unpack_idx)
        runtime.bounds.append(bound)
        runtime.groups.add(hook)
        self._apply_groups()
        handle = _Handle(self, bound)
        return handle  # type: ignore[return-value]

    def _remove(self, bound: Bound) -> None:
        runtime = self._runtime
        if bound in runtime.bounds:
            runtime.missed.over([bound])
            runtime.bounds.remove(bound)
            runtime.groups.drop(bound.hook)
            if bound.sink is not None:
                self._sink.release(bound.key)
            runtime.installed.sets.forget()
            runtime.installed.put_on()

    # -- groups ------------------------------------------------------------------------------------------------
    def create_hook_group(
        self,
        group_name: str,
        group_constructor: str,
        expected_shape: tuple[int | None, ...] | None = None,
        editing_function: Callable[..., Any] | None = None,
        unpack_idx: int | str = 0,
        hook_type: HookType = "forward",
    ) -> list[HookFunction]:
        """Register one hook on every module (or parameter) with ``group_constructor`` in its name, as one group."""
        if hook_type not in HOOK_TYPES:
            raise RegistrationError(f"hook_type={hook_type!r} is unknown; expected one of {', '.join(HOOK_TYPES)}.")
        of = "parameter" if hook_type == "tensor" else "module"
        self._runtime.look()
        found = self._runtime.names.match(lambda n: group_constructor in n, of=of)
        hooks = [HookFunction(n, expected_shape, editing_function, unpack_idx) for n, _ in found]
        done: list[RemovableHandle] = []
        try:
            for hook in hooks:
                done.append(self._register(hook, hook_type))
        except Exception:
            for handle in done:
                handle.remove()
            raise
        self._runtime.groups.tag(hooks, group_name)
        return hooks

    def update_hook_groups(self, group_constructor: Which, group_name: str) -> None:
        """Tag hooks with a group: a HookFunction, several, or all whose module name contains a string."""
        self._runtime.groups.tag(group_constructor, group_name)

    def remove_hook_groups(self, group_constructor: Which, group_name: str) -> None:
        """Take a group's tag off hooks; ``all`` cannot be taken off."""
        self._runtime.groups.untag(group_constructor, group_name)

    def get_hook_function_groups(self, hook_function: HookFunction) -> set[str]:
        return self._runtime.groups.of(hook_function)

    def get_group_hook_functions(self, group_name: str) -> list[HookFunction]:
        return self._runtime.groups.members(group_name)

    @contextmanager
    def groups(self, groups: str | Sequence[str] = ALL, *, complement: bool = False) -> Iterator[None]:
        """Which groups are on within the block, for whoever calls the model."""
        self._runtime.groups.check(groups)  # an unknown one changes nothing
        before, self._chosen = self._chosen, (groups, complement)
        self._apply_groups()
        try:
            yield
        finally:
            self._chosen = before
            self._apply_groups()

    def _apply_groups(self) -> None:
        on = self._runtime.groups.chosen(*self._chosen)
        for bound in self._runtime.bounds:
            if not bound.temporary:
                bound.enabled = bound.hook in on
        self._runtime.installed.put_on()

    # -- capture and edit --------------------------------------------------------------------------------------
    def at(self, component: str, layer: Layers = None, *, head: int | Sequence[int] | None = None) -> Place:
        """A part of a transformer by a name that is the same for all architectures; goes where a pattern goes.

        >>> with fm.capture(fm.at("resid_post", 5), fm.at("z", 5, head=3), "lm_head") as acts:   # doctest: +SKIP
        ...     fm(**inputs)
        >>> acts[fm.at("z", 5, head=3)].shape                                   # doctest: +SKIP
        torch.Size([4, 6, 64])
        >>> with fm.edit(fm.at("z", 5, head=[3, 7]), edits.zero()):             # doctest: +SKIP
        ...     fm(**inputs)

        ``component``, in the words of TransformerLens: ``embed``, ``pos_embed``; of a layer ``resid_pre``,
        ``resid_mid``, ``resid_post``, ``ln1``, ``ln2`` (what the norm gives, weights included), ``attn_out``,
        ``mlp_out`` (what is added to the stream), ``q``, ``k``, ``v`` (of the projections, before norms and rotation),
        ``z``, ``pattern`` (probabilities), ``mlp_pre``, ``mlp_post`` (neurons), ``router`` (logits); ``ln_final``,
        ``unembed``. ``layer``: a number, also from the end, several, or None for all layers that have it.

        ``q``, ``k``, ``v``, ``z`` are (B, S, heads, d_head); with ``head=3`` (B, S, d_head), with a list
        (B, S, len, d_head); a ``select`` of ``capture`` or ``edit`` selects from these. Key-value heads are counted
        for themselves. Everything else has the shape that the model gives it: in OPT's MLP and in routers rows are
        (B * S). All ranks of a pipeline call it.

        Where the sums of the residual stream do not hold in the model's forward, asking for the value (or leaving the
        edit) raises ComponentError; so does whatever the model has not, or does not tell.
        """
        runtime = self._runtime
        runtime.look()
        names = runtime.names
        return Finder(names.everywhere(), names.class_of, getattr(names.root, "config", None)).at(
            component, layer, head
        )

    @capturing
    def capture(
        self,
        *patterns: Pattern | Place,
        hook_type: HookType = "forward",
        unpack_idx: int | str | Sequence[int | str] = 0,
        select: Any = None,
        deliver: Deliver = "all",
        grad: bool = False,
        detach: bool = True,
        stop: bool = False,
    ) -> Iterator[Captured]:
        """Capture everything the patterns match while the block runs; the values are there when the forward is over.

        ``grad=True`` also keeps the gradient of each value (``acts.grad(name)``), on frozen models too.
        ``detach=False`` hands out the value with its graph, on its device. All ranks enter and leave the block.
        A block of one call is ``run`` for short:

        >>> fm.capture(fm.at("resid_post")).run(**inputs).stack()               # doctest: +SKIP

        >>> with fm.capture(fm.at("resid_post", 5), stop=True) as acts:         # doctest: +SKIP
        ...     for batch in batches:
        ...         fm(**batch)                                                  # layers 6 and on do not run

        ``stop=True`` ends each forward as soon as every hook that is on has fired once, on all ranks and stages;
        ``fm(...)`` then returns None, and a pipeline's stages hand on NaN. A forward that somebody else has called,
        such as ``generate``, ends the block. Every captured module must run on every rank.
        """
        runtime = self._runtime
        runtime.look()
        bounds, acts, spots = capture_bounds(
            runtime,
            patterns,
            hook_type,
            unpack_idx,
            select=select,
            deliver=deliver,
            grad=grad,
            detach=detach,
            stop=stop,
        )
        with hooks_on(runtime, bounds, spots, acts.refused, stop=stop) as acts.block:
            yield acts

    @editing
    def edit(
        self,
        pattern: Pattern | Place,
        editing_function: Callable[..., Any],
        *,
        hook_type: HookType = "forward",
        **keywords: Any,
    ) -> Iterator[list[HookFunction]]:
        """Apply an editing function wherever the pattern matches within the block; takes HookFunction's keywords.

        Once a firing, whatever number of names a module has. A block of one call is ``run`` for short:

        >>> fm.edit(fm.at("z", 5, head=3), edits.zero()).run(**inputs).logits   # doctest: +SKIP
        """
        runtime = self._runtime
        runtime.look()
        keywords = {"capture": False, **keywords}
        bounds, spots = edit_bounds(runtime, pattern, editing_function, hook_type, keywords, self._sink, self._deliver)
        wrong: dict[Any, Exception] = {}
        with hooks_on(runtime, bounds, spots, wrong, deliver=False):
            yield [b.hook for b in bounds]
        for error in wrong.values():
            raise error

    def flush(self) -> None:
        """Deliver what is still on its way. All ranks call it."""
        self._runtime.outbox.flush()

    # -- the whole of things -----------------------------------------------------------------------------------
    def full_output(self, output: Any) -> Any:
        """The whole output, in capture order, from what this rank's forward returned; differentiable. Collective."""
        return full_output(self._runtime, output)

    def full_batch(self, batch: Any) -> Any:
        """The whole batch, in capture order, from this rank's part: any tree of tensors, batch first. Collective."""
        return full_batch(self._runtime, batch)

    def register_trainable_module(self, name: str, module: nn.Module) -> None:
        """Make ``module`` available to every editing function as ``modules[name]``; its parameters are FlexModel's."""
        if not isinstance(module, nn.Module):
            raise RegistrationError(f"trainable module {name!r} must be an nn.Module, got {type(module).__name__}.")
        if name in self.trainable_modules:
            raise RegistrationError(
                f"a trainable module {name!r} is registered already; take another name.", page="registered-twice"
            )
        self.trainable_modules[name] = module
        mesh = largest_mesh(self.module)
        if mesh is not None:
            self.trainable_modules.on_mesh(mesh)

    def get_module_parameter(self, parameter_name: str, expected_shape: tuple[int | None, ...] | None = None) -> Tensor:
        """The full parameter, detached and on the CPU, on every rank. Collective."""
        runtime = self._runtime
        runtime.look()
        name = runtime.names.clean(parameter_name, of="parameter")
        full = full_parameter(runtime, name).cpu()
        if expected_shape is not None:
            hook = HookFunction(name, expected_shape)
            bound = Bound(hook, "tensor", name, name, self.module)
            problem = check_expected(bound, full)
            if problem:
                raise ShapeError(problem)
        return full

    # -- names -------------------------------------------------------------------------------------------------
    def whole_module(self, name: str) -> nn.Module:
        """A copy of a module with its whole, frozen parameters, on every rank: plain code, in eval mode. Collective.

        >>> unembed = fm.whole_module("lm_head")                     # doctest: +SKIP
        >>> logits = unembed(acts["model.norm"])                     # doctest: +SKIP

        Of a pipeline it is sent from the stage that has it. Raises EngineError under engines whose modules are parts
        (Megatron-core, fairscale), and of modules that several stages share.
        """
        self._runtime.look()
        return whole_module(self._runtime, name)

    @property
    def wrapped_module_names(self) -> list[str]:
        """Clean names of the wrapped model's modules."""
        return self._runtime.names.everywhere()

    @property
    def trainable_modules_names(self) -> list[str]:
        return list(self.trainable_modules.keys())

    @property
    def all_modules_names(self) -> list[str]:
        return self.wrapped_module_names + self.trainable_modules_names

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """The wrapped model's parameters by their plain names, then ``trainable_modules.*``."""
        if recurse:
            inner = self.module.named_parameters("", True, remove_duplicate)
            yield from self._runtime.names.cleaned(inner, prefix)
            own = f"{prefix}.trainable_modules" if prefix else "trainable_modules"
            yield from self.trainable_modules.named_parameters(own, True, remove_duplicate)

    def named_buffers(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, Tensor]]:
        if recurse:
            inner = self.module.named_buffers("", True, remove_duplicate)
            yield from self._runtime.names.cleaned(inner, prefix)
            own = f"{prefix}.trainable_modules" if prefix else "trainable_modules"
            yield from self.trainable_modules.named_buffers(own, True, remove_duplicate)

    def _fqn_modifiers(self) -> dict[str, str]:
        """For torch.distributed.checkpoint: the wrapped model's children are found under ``module``."""
        inner = self.module
        return {name: "module" for name in (*inner._modules, *inner._parameters, *inner._buffers)}

    # -- kept ----------------------------------------------------------------------------------------------------
    def save_hooks(self, path: str | Path) -> Path:
        """Keep the registered hooks, with groups, selections and edits, in the folder ``path``: JSON and safetensors.

        Edits are presets of ``flex_model.edits``, or functions that can be imported; others raise EditError.
        """
        from flex_model.edits.hooks import save_hooks

        return save_hooks(self, path)

    def load_hooks(self, path: str | Path) -> list[RemovableHandle]:
        """Register what ``save_hooks`` kept, all or nothing. Functions are imported from where they were: only load
        what you trust to name them."""
        from flex_model.edits.hooks import load_hooks

        return load_hooks(self, path)

    def restore(self) -> nn.Module:
        """Take every hook off and return the wrapped module as it was given."""
        runtime = self._runtime
        runtime.missed.over(runtime.bounds)
        for bound in runtime.bounds:
            runtime.groups.drop(bound.hook)
        runtime.bounds.clear()
        runtime.installed.take_off()
        runtime.installed.sets.forget()
        return self.module


class _Handle:
    """Takes one registered hook off; usable as a context manager, like torch's."""

    def __init__(self, model: FlexModel, bound: Bound) -> None:
        self._model, self._bound = weakref.ref(model), bound

    def remove(self) -> None:
        model = self._model()
        if model is not None:
            model._remove(self._bound)

    def __enter__(self) -> _Handle:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()
