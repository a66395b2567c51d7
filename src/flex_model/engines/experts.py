"""Mixtures of experts of transformers, on one process or on many: the token and the expert of every row inside them.

Nothing is declared by transformers, so its code is watched at work. All its implementations take rows out of the
hidden states by index; that index says which token a row is. The expert follows from the routing in the order in
which an implementation takes them, and must be one that the token has chosen. Under expert parallelism the classes
``AllToAllEP`` and ``AllReduceEP`` say what was sent where, and which rows are fillings for experts of other ranks.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from flex_model.engines.engine import Engine, axes_of_mesh
from flex_model.routing.rows import Gathered, Origin, RowSource

__all__ = ["ExpertsEngine"]


class ExpertsEngine(Engine):
    """Some module is an experts module of transformers."""

    name: ClassVar[str] = "experts"
    distributed: ClassVar[bool] = False

    @classmethod
    def find(cls, module: nn.Module) -> ExpertsEngine | None:
        if "transformers.integrations.moe" not in sys.modules:
            return None
        return cls(module) if any(_is_mixture(m) for m in module.modules()) else None

    @cached_property
    def row_sources(self) -> Sequence[RowSource]:
        return [_Mixture(m) for m in self.module.modules() if _is_mixture(m)]

    @property
    def other_lines(self) -> frozenset[tuple[int, ...]]:
        # Experts have a mesh of their own over the same ranks; only what the dense mesh shares is an axis.
        manager = next((v for m in self.module.modules() if (v := m.__dict__.get("_mesh_manager")) is not None), None)
        if manager is None:
            return frozenset()
        dense, expert = (
            {a.ranks for a in axes_of_mesh(m, "tensor", "axis")} for m in (manager._dense_mesh, manager._expert_mesh)
        )
        return frozenset(expert - dense)

    def make_whole(self, twin: nn.Module) -> None:
        mixtures: list[Any] = [m for m in twin.modules() if _is_mixture(m)]
        for module in mixtures:
            if (
                module.config._experts_implementation == "eager"
            ):  # it asks which experts are hit; no meta tensor can say
                module.config = copy.copy(module.config)
                module.config._experts_implementation = "grouped_mm"
            if module._is_expert_parallel:
                module.num_experts = next(p.shape[0] for p in module.parameters(recurse=False))
                module._is_expert_parallel = False


def _is_mixture(module: nn.Module) -> bool:
    """Whether transformers' ``use_experts_implementation`` made the module's class."""
    return "_is_expert_parallel" in module.__dict__ and hasattr(module, "_apply_gate")


class _Handle:
    def __init__(self, remove: Callable[[], None]) -> None:
        self.remove = remove


class _Gathers(TorchFunctionMode):
    """Tells of every selection of rows from ``hidden``."""

    def __init__(self, hidden: Tensor, note: Callable[[Tensor], None]) -> None:
        super().__init__()
        self._place, self._shape, self._note = hidden.data_ptr(), hidden.shape, note

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in (Tensor.__getitem__, Tensor.repeat_interleave) and self._is_hidden(args[0]):
            index = args[1]
            if func is Tensor.repeat_interleave:
                index = torch.arange(self._shape[0], device=out.device).repeat_interleave(index)
            if isinstance(index, Tensor) and index.dtype == torch.long and index.dim() == 1:
                self._note(index)
        return out

    def _is_hidden(self, tensor: Tensor) -> bool:
        return type(tensor) is Tensor and tensor.shape == self._shape and tensor.data_ptr() == self._place


class _Mixture:
    """One experts module, watched."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self._inside = {id(m) for m in module.modules()} - {id(module)}
        self._ways = _ways(module)
        self.spread = tuple(dist.get_process_group_ranks(self._ways[0].ep_mesh.get_group())) if self._ways else ()
        self._serial = 0
        self._checked: set[str] = set()
        self._core: _Core | None = None
        self._mode: Any = None

    def holds(self, module: nn.Module) -> bool:
        return id(module) in self._inside

    def rows(self, value: Tensor) -> Gathered | None:
        core = self._core
        now = None if core is None else core.now
        return now if now is not None and value.dim() > 1 and value.shape[0] == now.total else None

    def watch(self) -> Sequence[_Handle]:
        """Look on at whatever runs the experts."""
        if _by_ranks(self.module) is not None:
            return [h for way in self._ways for h in self._watch_way(way)]
        before = self.module.register_forward_pre_hook(self._enter, with_kwargs=True)
        after = self.module.register_forward_hook(self._leave, always_call=True)
        return [_Handle(before.remove), _Handle(after.remove)]

    # -- on one process, or with whole experts on every rank ---------------------------------------------------
    def _enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        found = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)]
        ids = next((t for t in found[1:] if not t.is_floating_point()), None)
        if ids is not None and ids.dim() == 2 and self._mode is None:
            self._mode = self._looking(found[0], ids, Origin(self._next(), ids.shape[0]))
            self._mode.__enter__()

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        mode, self._mode = self._mode, None
        if mode is not None:
            mode.__exit__(None, None, None)

    # -- with experts spread over ranks ------------------------------------------------------------------------
    def _watch_way(self, way: Any) -> list[_Handle]:
        run, dispatch = way.experts_forward, getattr(way, "_dispatch_tokens", None)
        state: list[Any] = [None]

        def dispatched(*args: Any) -> Any:
            out = dispatch(*args)  # type: ignore[misc]
            state[0] = out[3]
            return out

        def watched(hidden: Tensor, ids: Tensor, weights: Tensor, *args: Any, **kwargs: Any) -> Any:
            origin = (
                Origin(self._next(), hidden.shape[0]) if dispatch is None else _exchanged(self._next(), way, state[0])
            )
            filling = dispatch is not None and not sum(state[0].recv_sizes)  # a row so that experts run on something
            with self._looking(hidden, ids, origin, way.ep_mesh.get_local_rank(), filling):
                return run(hidden, ids, weights, *args, **kwargs)

        way.experts_forward = watched
        if dispatch is not None:
            way._dispatch_tokens = dispatched

        def remove() -> None:
            way.experts_forward = run
            way.__dict__.pop("_dispatch_tokens", None)

        return [_Handle(remove)]

    def _next(self) -> int:
        self._serial += 1
        return self._serial

    @contextmanager
    def _looking(
        self, hidden: Tensor, ids: Tensor, origin: Origin, rank: int = 0, filling: bool = False
    ) -> Iterator[None]:
        order = _order_of(self.module)
        if order is None:
            yield
            return
        self._core = core = _Core(origin, ids, order, self.module, bool(self._ways), rank, filling, self._checked)
        try:
            with _Gathers(hidden, core.note):
                yield
        finally:
            self._core = None


class _Core:
    """One run of a module's own experts: ``ids`` are local, and as many as they are where the expert is elsewhere."""

    def __init__(
        self,
        origin: Origin,
        ids: Tensor,
        order: str,
        module: Any,
        spread: bool,
        rank: int,
        filling: bool,
        checked: set[str],
    ) -> None:
        self.origin, self.ids, self.order, self.filling = origin, ids.detach().clone(), order, filling
        self.count, self.spread, self.first = int(module.num_experts), spread, rank * int(module.num_experts)
        self._checked = checked
        self._turn = 0
        self._hit: list[int] | None = None
        self.now: Gathered | None = None

    def note(self, tokens: Tensor) -> None:
        """The implementation takes rows: these tokens."""
        experts = self._experts(len(tokens))
        self.now = None
        if experts is None or not self._have_chosen(tokens, experts):
            return
        kept = None
        if self.filling:
            kept = torch.zeros_like(experts, dtype=torch.bool)
        elif self.spread and self.order != "eager":
            kept = experts < self.count
        if kept is not None:
            kept = kept.nonzero().flatten()
            tokens, experts = tokens[kept], experts[kept]
        ordered = self.order == "batched_mm" and not self.spread
        total = len(tokens) if kept is None else self.ids.numel()
        self.now = Gathered(self.origin, self._turn, total, tokens, experts + self.first, kept, ordered)
        self._turn += 1

    def _experts(self, rows: int) -> Tensor | None:
        """The local expert of each row."""
        flat = self.ids.flatten()
        if self.order == "eager":  # one expert after the other, of those that some token has chosen
            if self._hit is None:
                self._hit = [e for e in flat.unique().tolist() if e < self.count]
            return flat.new_full((rows,), self._hit[self._turn]) if self._turn < len(self._hit) else None
        if rows != len(flat) or self._turn:
            return None
        return flat.sort().values if self.order == "grouped_mm" else flat

    def _have_chosen(self, tokens: Tensor, experts: Tensor) -> bool:
        """Whether every row's token has chosen its expert; asked once where one order serves all experts."""
        if self.order in self._checked:
            return True
        sure = bool((self.ids[tokens] == experts.unsqueeze(-1)).any(-1).all())
        if self.order == "eager":
            return sure and len(tokens) == int((self.ids == experts[:1]).sum())
        if sure:
            self._checked.add(self.order)
        return sure


def _order_of(module: Any) -> str | None:
    """The name of the implementation that runs, where it is one whose order of experts is known."""
    moe: Any = sys.modules["transformers.integrations.moe"]
    name = getattr(module.config, "_experts_implementation", None)
    if name == "eager":
        return "eager"
    known = {"grouped_mm": moe.grouped_mm_experts_forward, "batched_mm": moe.batched_mm_experts_forward}
    return name if name in known and moe.ALL_EXPERTS_FUNCTIONS[name] is known[name] else None


def _by_ranks(module: nn.Module) -> Any:
    """The object through which expert parallelism runs the module; None without it."""
    parallel: Any = sys.modules.get("transformers.distributed.expert_parallel")
    if parallel is None:
        return None
    cells = getattr(module.__dict__.get("forward"), "__closure__", None) or ()
    contents = [c.cell_contents for c in cells]
    return next((c for c in contents if isinstance(c, parallel.EPImplementation)), None)


def _ways(module: nn.Module) -> list[Any]:
    """The ways in which rows may come to the module's experts, of those whose order is known."""
    way = _by_ranks(module)
    if way is None:
        return []
    parallel: Any = sys.modules["transformers.distributed.expert_parallel"]
    ways = [way.all_to_all, way.all_reduce] if type(way) is parallel.AutoEP else [way]
    return [w for w in ways if type(w) in (parallel.AllToAllEP, parallel.AllReduceEP)]


def _exchanged(serial: int, way: Any, state: Any) -> Origin:
    """What ``AllToAllEP`` has sent: its slice of the batch, where tensor parallelism shares one, sorted by expert."""
    chosen = state.top_k_weights.shape[-1]
    first = way.tp_mesh.get_local_rank() * -(-state.num_tokens // way.tp_mesh.size())
    peers = tuple(dist.get_process_group_ranks(way.ep_mesh.get_group()))
    return Origin(serial, state.num_tokens, state.order // chosen + first, tuple(state.send_sizes), peers)
