"""Finding layouts during a call: gathers the evidence, claims, and settles claims with the other ranks.

Layouts are cached by site and form (number of dims, grad mode), so that a decoding loop infers once.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, Replicate
from torch.distributed.tensor.placement_types import Placement, Shard

from flex_model.engines import Engines
from flex_model.engines.engine import axes_of_mesh
from flex_model.errors import LayoutError
from flex_model.layout.claim import Claim, Evidence, claim
from flex_model.layout.layout import Layout, on_dim, shard_dim
from flex_model.layout.mesh import ModelMesh
from flex_model.layout.probe import BATCH, SEQUENCE, Along, BatchDim, Probe
from flex_model.layout.record import Key, Watched, input_kind, uncollected
from flex_model.layout.sequence import Order, order_by_positions
from flex_model.layout.twin import GlobalShapes, Shapes, Twin, TwinShapes, global_shapes
from flex_model.routing.agreement import settle, settle_alone
from flex_model.trees import Leaf, copy_tree, input_leaves

__all__ = ["Form", "Inference", "Spot", "placements_on"]

logger = logging.getLogger(__name__)


class Spot(NamedTuple):
    """A tensor of a module's input ("in") or output ("out"), or its gradient; ``override`` is what the user says."""

    name: str
    side: str
    index: int  # type: ignore[assignment]
    gradient: bool = False
    override: tuple[Any, ...] = ()
    occurrence: int = 0  # which firing of the module within a call
    rows: str = ""  # of tokens at experts: whether they are each rank's own, or in the batch's order

    @property
    def place(self) -> str:
        """For messages."""
        name = self.name or "(the model)"
        return name if self.side == "param" else f"{name} {self.side}put {self.index}"


class Form(NamedTuple):
    spot: Spot
    dims: int
    grad_mode: bool
    kind: int = 0  # of the call's inputs: a position table has a batch dim or none, by what the call was given


class Inference:
    """The layouts of one model under one set of engines."""

    def __init__(self, engines: Engines, mesh: ModelMesh, roots: Sequence[nn.Module]) -> None:
        self.engines, self.mesh, self.roots = engines, mesh, roots
        self.known: dict[Form, Layout | LayoutError] = {}
        self._common: dict[Form, Layout | LayoutError | None] = {}  # of a place; None where its firings differ
        self._claimed: dict[Form, tuple[Placement, ...]] = {}  # and not settled yet
        self._inputs: tuple[nn.Module, tuple[Any, ...], dict[str, Any]] | None = None
        self._entered = False  # through a module of the engine's
        self._watched: Watched = {}
        self._twin: TwinShapes | None = None
        self._found: dict[str, dict[Key, list[BatchDim]] | str] = {}  # what probes saw, or why they could not
        self._shapes: GlobalShapes = {}
        self._probed: set[tuple[Any, ...]] = set()
        self._passing: list[Form] = []  # refused in a way that the next call need not repeat
        self._probes = [SEQUENCE] if any(a.sequence for a in mesh.axes) else []
        if engines.parts or any(a.kind == "data" and not a.sequence for a in mesh.axes):
            self._probes.append(BATCH)
        self._order: Order | str = ""  # of the sequence over its axis, in this call
        self._batch_dims: dict[Form, BatchDim] = {}  # of a pipeline's values, whatever the grad mode
        self._kinds: dict[Any, int] = {}
        self._kind = 0
        self._occurrence: Counter[tuple[str, str]] = Counter()
        self._trivial = Layout(tuple(Replicate() for _ in mesh.axes), "one process")

    # -- a call ------------------------------------------------------------------------------------------------
    def new_call(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._occurrence:
            self._occurrence.clear()
        if self._passing:
            self._forget_passing()
        if self._probes:
            self._order = self.order(input_leaves(module, args, kwargs)) if SEQUENCE in self._probes else ""
            kind = (input_kind((args, kwargs)), str(self._order))
            self._kind = self._kinds.setdefault(kind, len(self._kinds))

    def order(self, inputs: Sequence[Leaf]) -> Order | str:
        """How the ranks of the sequence's axis share it, by the engine or by positions; or why that is unknown."""
        axes = [i for i, a in enumerate(self.mesh.axes) if a.sequence]
        if len(axes) != 1:
            return f"the mesh has {len(axes)} axes for it"
        stated = self.engines.sequence_order
        return stated or order_by_positions(inputs, self.mesh.axes[axes[0]].size, self.mesh.coordinate[axes[0]])

    def lacks(self, wanted: Mapping[tuple[Any, ...], nn.Module]) -> bool:
        """Whether a wanted value (name, side, index, gradient) was never looked for in a call of this kind."""
        return bool(self._probes or self.mesh.axes) and any((self._kind, *key) not in self._probed for key in wanted)

    @uncollected()
    def begin(
        self,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        wanted: Mapping[tuple[Any, ...], nn.Module],
    ) -> None:
        """A forward of ``module`` starts in which wanted values are new: keep its inputs, and probe the batch."""
        inside = {id(m) for m in module.modules()}
        wanted = {k: m for k, m in wanted.items() if id(m) in inside}
        fresh = {(self._kind, *k) for k in wanted} - self._probed
        if not fresh:
            return
        self._probed |= fresh
        self._watched = {key[:2]: m for key, m in wanted.items()}  # known ones may take another form in this call
        called, args, kwargs = self.engines.entry(module, args, kwargs)
        self._entered = called is not module
        self._inputs = (called, *copy_tree((args, kwargs), lambda t: t.detach().clone()))
        self._twin, self._found = None, {}
        self._shapes = global_shapes(module)
        if self._probes:
            module, args, kwargs = self._inputs
            probe = Probe(module, args, kwargs, self._watched, self.engines.batch_dim(module, (args, kwargs)))
            for along in self._probes:
                self._found[along.word] = self._tried(probe, along)

    @staticmethod
    def _tried(probe: Probe, along: Along) -> dict[Key, list[BatchDim]] | str:
        try:
            return probe.along(along)
        except Exception as error:
            failure = f"the {along.word} could not be probed ({type(error).__name__}: {str(error)[:200]})"
            logger.info("%s", failure)
            return failure

    def end(self) -> None:
        self._inputs = self._twin = None
        self._found = {}

    def passes(self, name: str, side: str) -> int:
        """Which firing of this side of the module it is within the call."""
        count = self._occurrence[name, side]
        self._occurrence[name, side] += 1
        return count

    # -- layouts -----------------------------------------------------------------------------------------------
    def form(self, spot: Spot, value: Tensor) -> Form:
        return Form(spot, value.dim(), torch.is_grad_enabled(), self._kind)

    def lookup(self, form: Form) -> Layout | LayoutError | None:
        """The settled layout; None where it is still to be claimed."""
        if not self.mesh.axes:
            return self._trivial
        found = self.known.get(form)
        if found is None and self._inputs is None:  # with the inputs at hand, every firing is claimed by itself
            found = self._common.get(_any_firing(form))
        if found is None and torch._C._current_graph_task_id() != -1:
            # a recomputation of what ran without gradients: reentrant checkpointing
            found = self._common.get(_any_firing(form._replace(grad_mode=not form.grad_mode)))
        return None if isinstance(found, Layout) and not found.proven else found

    def lookup_trivial(self) -> Layout | None:
        return None if self.mesh.axes else self._trivial

    def claim(
        self,
        form: Form,
        value: Tensor,
        module: nn.Module,
        occurrence: int,
        expected: tuple[int | None, ...] | None,
        parted: tuple[int, ...] = (),
    ) -> Claim:
        """This rank's claim for a value that has no settled layout; along ``parted`` axes its rows are its own."""
        spot = form.spot
        where = spot.place
        stated = {**self._ruled(module, spot, value.dim()), **self.stated(value)}
        stated.update({axis: (Shard(0), "tokens at their experts") for axis in parted})
        for axis, placement in spot.override:
            stated[axis] = (placement, "layout=")
        if self._inputs is None:
            for axis, placement in enumerate(self._earlier(form)):
                stated.setdefault(axis, (placement, "an earlier call"))
        key = Key(spot.name, spot.side, occurrence)
        evidence = Evidence(
            where=where,
            stated=stated,
            batch=self._probed_dim(BATCH, key, spot.index),
            sequence=self._probed_dim(SEQUENCE, key, spot.index),
            sequence_order=self._order,
            sharding=self._sharding,
            expected_shape=expected,
            unknown=""
            if parted or len(spot.override) == len(self.mesh.axes)
            else self.engines.unknown(module, spot.side, spot.index),
            late=self._on_axes(self.engines.late_gradients(module, spot.side, spot.index)),
            order=lambda dim, size: (
                self._disorder(key, spot.index) or self.engines.order(module, spot.side, dim - value.dim(), size)
            ),
            rows=bool(spot.rows),
            parted=parted,
            **self._twin_shapes(module, key, spot.index, stated),
        )
        plain = value.to_local() if isinstance(value, DTensor) else value
        made = claim(plain, evidence, self.mesh)
        if made.refusal and self._inputs is None:  # nothing was looked for in this call
            made = replace(made, passing=True)
        self._claimed[form] = made.placements
        return made

    def _earlier(self, form: Form) -> Sequence[Placement]:
        """What was found in a call before, or claimed in it and not settled yet."""
        other = form._replace(grad_mode=not form.grad_mode)
        known = self.known.get(form) or self.known.get(other)
        if known is None:
            return self._claimed.get(form) or self._claimed.get(other) or ()
        return known.placements if isinstance(known, Layout) else ()

    def stated(self, value: Tensor) -> Mapping[int, tuple[Placement, str]]:
        """What the value itself says: a DTensor's placements, or those its conversion to a local tensor left."""
        spec = value._spec if isinstance(value, DTensor) else getattr(value.grad_fn, "dtensor_spec", None)
        if spec is None:
            return {}
        word = "the value is a DTensor" if isinstance(value, DTensor) else "the engine's own conversion"
        return {
            axis: (_positive(placement, value.dim()), word)
            for axis, placement in placements_on(self.mesh, spec.mesh, spec.placements).items()
        }

    def _ruled(self, module: nn.Module, spot: Spot, dims: int) -> dict[int, tuple[Placement, str]]:
        """What the engines' rules for their own layers say."""
        ruled = self.engines.placements(module, spot.side, spot.index, dims)
        mine = self._mine
        return {mine[line]: (_positive(p, dims), "the engine's rule") for line, p in ruled.items() if line in mine}

    @cached_property
    def _sharding(self) -> frozenset[tuple[int, ...]]:
        return self.engines.sharding

    @cached_property
    def _mine(self) -> dict[tuple[int, ...], int]:
        """The mesh's axes by this rank's lines along them."""
        return {a.ranks: i for i, a in enumerate(self.mesh.axes)}

    def _on_axes(self, lines: Iterable[tuple[int, ...]]) -> tuple[int, ...]:
        return tuple(self._mine[line] for line in lines if line in self._mine)

    def _twin_shapes(self, module: nn.Module, key: Key, index: int, stated: Mapping[int, Any]) -> dict[str, Any]:
        undecided = [i for i, a in enumerate(self.mesh.axes) if a.kind == "tensor" and i not in stated]
        if not undecided:
            return {}
        if doubt := self.engines.doubt(module, key.side):
            return {"twin_failure": doubt}
        if self._inputs is None:
            return {"twin_failure": "its first call was before the hook was there"}
        if self._twin is None:
            called, args, kwargs = self._inputs
            roots = [m for m in called.modules() if any(m is root for root in self.roots)]
            inside = roots[0] if roots and not self._entered else called  # without its wrappers
            if roots:
                args, kwargs = self.engines.stage_inputs(args, kwargs)
            dim = self.engines.batch_dim(inside, (args, kwargs))
            kept = {a.ranks for a in self.mesh.axes if a.sequence}
            self._twin = Twin(inside, self.engines, self._shapes, dim, kept).shapes(args, kwargs, self._watched)
        shapes = self._twin

        def of(found: Shapes) -> tuple[int, ...] | None:
            here = found.get(key, ())
            return here[index] if index < len(here) else None

        return {"twin": of(shapes.once), "twin_twice": lambda: of(shapes.twice()), "twin_failure": shapes.failure}

    def _disorder(self, key: Key, index: int) -> str | None:
        return None if self._twin is None else self._twin.disordered.get((key, index))

    def _probed_dim(self, along: Along, key: Key, index: int) -> BatchDim | None:
        found = self._found.get(along.word)
        if isinstance(found, str):
            return BatchDim(refusal=found, failed=True)
        dims = None if found is None else found.get(key)
        return dims[index] if dims is not None and index < len(dims) else None

    def batch_of(self, form: Form) -> BatchDim | None:
        """The batch dim of a value met in a pipeline's step, where its microbatches are put together."""
        if form.spot.side == "param":
            return BatchDim()
        spot = form.spot._replace(gradient=False, override=())
        form = form._replace(spot=spot, grad_mode=True)
        found = self._probed_dim(BATCH, Key(spot.name, spot.side, spot.occurrence), spot.index)
        if found is not None:
            self._batch_dims[form] = found
            self._batch_dims.setdefault(_any_firing(form), found)
        return self._batch_dims.get(form) or self._batch_dims.get(_any_firing(form))

    def settle(self, claims: Mapping[Form, Claim]) -> None:
        """Agree with all ranks on the layouts claimed here. Collective."""
        if not self.mesh.axes:
            return
        for form in claims:
            self._claimed.pop(form, None)
        with uncollected():
            settled = settle(claims, self.mesh)
        for form, found in settled.items():
            self.known[form] = found
            if isinstance(found, LayoutError) and found.passing:
                self._passing.append(form)
            place = _any_firing(form)
            before = self._common.setdefault(place, found)
            if not _alike(before, found):
                self._common[place] = None
            elif isinstance(found, Layout):
                self._common[place] = found

    def _forget_passing(self) -> None:
        """What was refused for want of a look is looked at again."""
        for form in self._passing:
            self.known.pop(form, None)
            self._common.pop(_any_firing(form), None)
        places = {form.spot[:2] for form in self._passing}
        self._probed = {key for key in self._probed if key[1:3] not in places}
        self._passing.clear()

    def settle_alone(self, form: Form, claim: Claim) -> None:
        """Take this rank's claim for rows at experts: that they are its own needs nobody else."""
        self.known[form] = found = settle_alone(claim, self.mesh)
        self._common.setdefault(_any_firing(form), found)

    def gradient_layout(self, forward: Layout, grad: Tensor) -> Layout:
        """The layout of a gradient, from that of the value it belongs to."""
        placements = list(forward.placements)
        for axis, placement in enumerate(placements):
            if shard_dim(placement) is None and self.mesh.axes[axis].kind == "data":
                placements[axis] = Partial("avg" if self.mesh.mean else "sum")
            elif isinstance(placement, Partial):
                placements[axis] = Replicate()
        for axis in forward.late:
            placements[axis] = Partial("sum")
        for axis, (placement, _) in self.stated(grad).items() if isinstance(grad, DTensor) else ():
            placements[axis] = placement
        return replace(forward, placements=tuple(placements))


def _any_firing(form: Form) -> Form:
    return form if form.spot.occurrence == 0 else form._replace(spot=form.spot._replace(occurrence=0))


def _alike(a: Layout | LayoutError | None, b: Layout | LayoutError) -> bool:
    if isinstance(a, Layout) and isinstance(b, Layout):
        return a.placements == b.placements
    return isinstance(a, LayoutError) and isinstance(b, LayoutError)


def _positive(placement: Placement, dims: int) -> Placement:
    dim = shard_dim(placement)
    return placement if dim is None or dim >= 0 else on_dim(placement, dim + dims)


def placements_on(mesh: ModelMesh, device_mesh: Any, placements: Any) -> dict[int, Placement]:
    """Placements of a DTensor by the model's axes."""
    lines = [a.ranks for a in axes_of_mesh(device_mesh, "tensor", "axis")]
    mine = {a.ranks: i for i, a in enumerate(mesh.axes)}
    return {mine[line]: p for line, p in zip(lines, placements, strict=True) if line in mine}
