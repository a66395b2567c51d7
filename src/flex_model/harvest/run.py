"""``Run``: one rank's part of a harvest: its hooks, its part of each batch, and what it writes of each site."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from flex_model.components.place import Place
from flex_model.core.asked import asked
from flex_model.core.block import evaluating, hooks_on
from flex_model.core.bound import Bound
from flex_model.core.hook_function import HookFunction, HookType
from flex_model.core.naming.globs import Pattern
from flex_model.core.register import bind
from flex_model.errors import HarvestError, RegistrationError
from flex_model.harvest.batch import Batch, Wanted, as_batch
from flex_model.harvest.share import Met, Share
from flex_model.harvest.sink import Taking
from flex_model.harvest.together import Together
from flex_model.layout.mesh import Axis, ModelMesh
from flex_model.routing.item import Deliver
from flex_model.routing.selection import Selection
from flex_model.store import StoredSite
from flex_model.store.dtypes import dtype_name, torch_dtype

if TYPE_CHECKING:
    from flex_model.core.flex_model import FlexModel

__all__ = ["Asked", "Run", "asked_for"]


@dataclass(frozen=True, slots=True)
class Asked:
    """What a harvest was asked for."""

    patterns: Sequence[Pattern | Place]
    wanted: Wanted
    hook_type: HookType = "forward"
    unpack_idx: int | str = 0
    select: Any = None
    dtype: torch.dtype | None = None
    own_batches: bool = False
    stop: bool = True
    commit_every: int | None = None
    about: dict[str, Any] = field(default_factory=dict)


def asked_for(
    patterns: Pattern | Place | Sequence[Pattern | Place],
    *,
    rows: str | None,
    positions: Any,
    exclude_tokens: Sequence[int],
    columns: Sequence[str],
    dtype: torch.dtype | str | None,
    **options: Any,
) -> Asked:
    """The arguments of ``harvest`` and ``stream``."""
    one = isinstance(patterns, (str, Place)) or callable(patterns)
    return Asked(
        [patterns] if one else list(patterns),  # type: ignore[list-item,arg-type]
        Wanted(tuple(columns), tuple(exclude_tokens), positions, rows),
        dtype=None if dtype is None else torch_dtype(dtype),
        **options,
    )


class Run:
    """One harvest on one rank. ``sites`` are known once the first step is over."""

    def __init__(self, fm: FlexModel, job: Asked, forward: Callable[..., Any] | None, *, whole: bool = False) -> None:
        runtime = fm._runtime
        runtime.look()
        self.fm, self.job, self.runtime, self.whole = fm, job, runtime, whole
        self.together = Together(runtime)
        self.sites: dict[str, StoredSite] = {}
        data = [(a.size, place) for a, place in _places(runtime.whole) if a.kind == "data" and not a.sequence]
        self.dealers, self.place = 1, 0
        for size, place in data:
            self.dealers, self.place = self.dealers * size, self.place * size + place
        others = [place for a, place in _places(runtime.whole) if a.kind != "data" or a.sequence]
        self.writes_columns = not any(others)
        self.taking = Taking(runtime.copies, job.dtype, rank=self.place, own_batches=job.own_batches)
        self.selections: dict[str, Selection] = {}
        self.bounds, self.spots = self._bounds()
        self._forward = forward or self._call
        holds = next(fm.module.parameters(), None) is not None
        self._device = runtime.device_of_values if holds else None  # a model of no parameters runs anywhere
        self._takes = _arguments(fm.module)
        self.columns: dict[str, str] = {}

    def _bounds(self) -> tuple[list[Bound], list[Any]]:
        job = self.job
        if job.hook_type not in ("forward", "forward_pre"):
            raise RegistrationError(
                f"hook_type={job.hook_type!r}: a harvest takes values; expected 'forward' or 'forward_pre'.",
                page="bad-argument",
            )
        found = asked(
            self.runtime.names, job.patterns, hook_type=job.hook_type, unpack_idx=job.unpack_idx, select=job.select
        )
        bounds: list[Bound] = []
        deliver: Deliver = "all" if self.whole else "shards"
        sink: Any = self.taking
        for one in found:
            if one.select is not None:
                self.selections[one.key] = Selection.of(one.select)
            hook = HookFunction(one.name, unpack_idx=one.unpack_idx)
            bounds.append(bind(self.runtime, hook, one.hook_type, one.key, sink, deliver, temporary=True))
        return bounds, [a.spot for a in found if a.spot is not None]

    # -- the model ---------------------------------------------------------------------------------------------
    @contextmanager
    def hooked(self) -> Iterator[None]:
        """The hooks are on, and the model is in eval mode without gradients."""
        hooks = hooks_on(self.runtime, self.bounds, self.spots, self.taking.refused, stop=self.job.stop)
        with torch.no_grad(), hooks, evaluating(self.fm.module):
            yield

    def batch(self, given: Any, context: int | None) -> tuple[Batch, Batch]:
        """The whole batch of a step, whose first context has this number, and this rank's part of it."""
        whole = as_batch(given, self.job.wanted, takes=self._takes, context=context)
        return whole, whole if self.job.own_batches else whole.dealt(self.place, self.dealers)

    def step(self, number: int, batch: Batch, *, of: Batch | None = None) -> None:
        """A forward of this rank's part; ``of``: the batch whose rows are taken, where values come whole. In the first
        one it is found out what each rank has to take."""
        args, kwargs = batch.to(self._device)
        taken = batch if of is None else of
        self.taking.begin(number, taken)
        self._forward(*args, **kwargs)
        if self.taking.shares is None or (self.whole and not self.runtime.lockstep):
            self.runtime.outbox.flush()
        if self.taking.shares is None:
            self._learn(taken)
            self.taking.again()

    def _call(self, *args: Any, **kwargs: Any) -> None:
        config = getattr(self.fm.module, "config", None)
        if getattr(config, "use_cache", False) and self._takes is not None and "use_cache" in self._takes:
            kwargs.setdefault("use_cache", False)  # it would be thrown away
        self.fm(*args, **kwargs)

    def _learn(self, batch: Batch) -> None:
        """From the first step: every rank's share of each site."""
        self.meet()
        mine = {
            name: Met(tuple(local.shape), dtype_name(self.job.dtype or local.dtype), layout)
            for name, (local, layout) in self.taking.first.items()
        }
        everyone = self.together.tell(mine, "what each rank has met")
        by_rank = dict(zip(self.runtime.whole.ranks, everyone, strict=True)) if self.runtime.whole.axes else {0: mine}
        names = [str(b.key) for b in self.bounds]
        mesh = ModelMesh(timeout=timedelta()) if self.whole else self.runtime.mesh
        if missing := [name for name in names if not any(name in theirs for theirs in everyone)]:
            why = self.taking.nothing.get(missing[0], "no forward of the first step ran it")
            raise HarvestError(f"{missing[0]!r} has no rows: {why}.", page="harvest-rows")
        here = [by_rank[rank] for rank in mesh.ranks] if mesh.axes else [mine]
        shares = self.together.each(lambda: self._shares(names, here, batch, mesh), "what each rank writes")
        told = self.together.tell(
            {n: (share.row_shape, share.way, str(mine[n].layout.placements)) for n, share in shares.items()},
            "the shapes of rows",
        )
        known = {name: found for theirs in told for name, found in theirs.items()}
        met = {name: one for theirs in everyone for name, one in theirs.items()}
        self.sites = {name: StoredSite(known[name][0], met[name].dtype, known[name][2]) for name in names}
        self.columns = {name: dtype_name(column.dtype) for name, column in batch.columns.items()}
        self.taking.know(shares, {way for theirs in told for _, way, _ in theirs.values()})

    def _shares(
        self, names: Sequence[str], met: Sequence[dict[str, Met]], batch: Batch, mesh: ModelMesh
    ) -> dict[str, Share]:
        """Of the sites on this rank's stage."""
        here = [(number, name) for number, name in enumerate(names) if name in met[mesh.me]]
        modules = {str(b.key): b.module for b in self.bounds}
        activation = (torch.empty(1, 1, 1, device="meta"),)
        return {
            name: Share(
                name,
                [theirs[name] for theirs in met],
                batch.grid,
                mesh,
                number=number,
                sites=len(here),
                selection=self.selections.get(name),
                sample=self.taking.first[name][0],
                second=self.runtime.engines.batch_dim(modules[name], activation) == 1,  # type: ignore[arg-type]
            )
            for number, name in here
        }

    def meet(self) -> None:
        """Ranks tell one another of what failed. Collective."""
        self.together.each(self.raise_failure, "a meeting of the harvest")

    def raise_failure(self) -> None:
        """This rank's, if there was one."""
        for error in (self.taking.error, *self.taking.refused.values()):
            if error is not None:
                raise error

    # -- a step's end ------------------------------------------------------------------------------------------
    def beside(self, batch: Batch) -> tuple[dict[str, Tensor], list[tuple[int, int]]]:
        """The side columns that this rank writes, and the parts of the step that they are."""
        if not self.writes_columns:
            return {}, []
        _, parts = self.taking.rows_of((), lambda length: None)
        return {name: column[batch.keep] for name, column in batch.columns.items()}, parts


def _places(mesh: ModelMesh) -> list[tuple[Axis, int]]:
    return list(zip(mesh.axes, mesh.coordinate, strict=True))


def _arguments(module: nn.Module) -> list[str] | None:
    """The names of a model's arguments; None where it takes any."""
    try:
        parameters = inspect.signature(module.forward).parameters.values()
    except (TypeError, ValueError):
        return None
    named = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    anything = any(p.kind is p.VAR_KEYWORD for p in parameters)
    return None if anything and "input_ids" not in named else named
