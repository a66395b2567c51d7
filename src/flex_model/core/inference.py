"""Finding layouts during a call: gathers the evidence, claims, and settles claims with the other ranks.

Layouts are cached by site and form (number of dims, grad mode), so that a decoding loop infers once.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, Replicate
from torch.distributed.tensor.placement_types import Placement, Shard, _StridedShard

from flex_model.engines import Engines
from flex_model.engines.engine import axes_of_mesh
from flex_model.errors import LayoutError
from flex_model.layout.claim import Claim, Evidence, claim
from flex_model.layout.layout import Layout, shard_dim
from flex_model.layout.mesh import ModelMesh
from flex_model.layout.probe import BatchDim, probe_batch
from flex_model.layout.record import Key, Watched, input_kind
from flex_model.layout.twin import Twin, TwinShapes
from flex_model.routing.agreement import settle
from flex_model.trees import copy_tree

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
        self._inputs: tuple[nn.Module, tuple[Any, ...], dict[str, Any]] | None = None
        self._watched: Watched = {}
        self._twin: TwinShapes | None = None
        self._batch: dict[Key, list[BatchDim]] | None = None
        self._batch_failure = ""
        self._probed: set[tuple[Any, ...]] = set()
        self._probes = bool(engines.parts) or any(a.kind == "data" for a in mesh.axes)
        self._batch_dims: dict[Form, BatchDim] = {}  # of a pipeline's values, whatever the grad mode
        self._kinds: dict[tuple[Any, ...], int] = {}
        self._kind = 0
        self._occurrence: Counter[tuple[str, str]] = Counter()
        first = next((p for root in roots for p in root.parameters()), None)
        self._device = torch.device("cpu" if first is None else first.device.type)  # ranks talk through it
        self._trivial = Layout(tuple(Replicate() for _ in mesh.axes), "one process")

    # -- a call ------------------------------------------------------------------------------------------------
    def new_call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._occurrence:
            self._occurrence.clear()
        if self._probes:
            kind = input_kind((args, kwargs))
            self._kind = self._kinds.setdefault(kind, len(self._kinds))

    def lacks(self, wanted: Mapping[tuple[Any, ...], nn.Module]) -> bool:
        """Whether a wanted value (name, side, index) has never been looked for in a call of this kind."""
        return (self._probes or bool(self.mesh.axes)) and any((self._kind, *key) not in self._probed for key in wanted)

    def begin(
        self,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        wanted: Mapping[tuple[Any, ...], nn.Module],
    ) -> None:
        """A forward of ``module`` starts in which wanted values are new: keep its inputs, and probe the batch."""
        inside = {id(m) for m in module.modules()}
        fresh = {k: m for k, m in wanted.items() if (self._kind, *k) not in self._probed and id(m) in inside}
        if not fresh:
            return
        self._probed |= {(self._kind, *key) for key in fresh}
        self._watched = {key[:2]: m for key, m in fresh.items()}
        self._inputs = (module, *copy_tree((args, kwargs), lambda t: t.detach().clone()))
        self._twin = self._batch = None
        if self._probes:
            self._probe()

    def _probe(self) -> None:
        assert self._inputs is not None
        module, args, kwargs = self._inputs
        try:
            self._batch = probe_batch(module, args, kwargs, self._watched)
        except Exception as error:
            self._batch, self._batch_failure = {}, f"{type(error).__name__}: {str(error)[:200]}"
            logger.info("the batch could not be probed: %s", self._batch_failure)

    def end(self) -> None:
        self._inputs = self._twin = self._batch = None

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
    ) -> Claim:
        """This rank's claim for a value that has no settled layout."""
        spot = form.spot
        where = spot.place
        stated = {**self._ruled(module, spot, value.dim()), **self.stated(value)}
        for axis, placement in spot.override:
            stated[axis] = (placement, "layout=")
        known = self.known.get(form) or self.known.get(form._replace(grad_mode=not form.grad_mode))
        if isinstance(known, Layout) and self._inputs is None:
            for axis, placement in enumerate(known.placements):
                stated.setdefault(axis, (placement, "an earlier call"))
        key = Key(spot.name, spot.side, occurrence)
        evidence = Evidence(
            where=where,
            stated=stated,
            batch=self._batch_dim(key, spot.index),
            expected_shape=expected,
            sharding=self._sharding,
            order=lambda dim, size: self.engines.order(module, spot.side, dim - value.dim(), size),
            **self._twin_shapes(key, spot.index, stated),
        )
        plain = value.to_local() if isinstance(value, DTensor) else value
        return claim(plain, evidence, self.mesh)

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
        mine = {a.ranks: i for i, a in enumerate(self.mesh.axes)}
        ruled = self.engines.placements(module, spot.side, spot.index, dims)
        return {mine[line]: (_positive(p, dims), "the engine's rule") for line, p in ruled.items() if line in mine}

    @cached_property
    def _sharding(self) -> frozenset[tuple[int, ...]]:
        return self.engines.sharding

    def _twin_shapes(self, key: Key, index: int, stated: Mapping[int, Any]) -> dict[str, Any]:
        undecided = [i for i, a in enumerate(self.mesh.axes) if a.kind == "tensor" and i not in stated]
        if not undecided:
            return {}
        if self._inputs is None:
            return {"twin_failure": "its first call was before the hook was there"}
        if self._twin is None:
            module, args, kwargs = self._inputs
            roots = [m for m in module.modules() if any(m is root for root in self.roots)]
            inside = roots[0] if roots else module  # without its wrappers
            if roots:
                args, kwargs = self.engines.stage_inputs(args, kwargs)
            self._twin = Twin(inside, self.engines).shapes(args, kwargs, self._watched)
        once, twice = self._twin.once.get(key), self._twin.twice.get(key)
        return {
            "twin": once[index] if once is not None and index < len(once) else None,
            "twin_twice": twice[index] if twice is not None and index < len(twice) else None,
            "twin_failure": self._twin.failure,
        }

    def _batch_dim(self, key: Key, index: int) -> BatchDim | None:
        if self._batch is None:
            return None
        if self._batch_failure and not self._batch:
            return BatchDim(refusal=f"the batch could not be probed ({self._batch_failure})")
        found = self._batch.get(key)
        return found[index] if found is not None and index < len(found) else None

    def batch_of(self, form: Form) -> BatchDim | None:
        """The batch dim of a value met in a pipeline's step, where its microbatches are put together."""
        if form.spot.side == "param":
            return BatchDim()
        spot = form.spot._replace(gradient=False, override=())
        form = form._replace(spot=spot, grad_mode=True)
        found = self._batch_dim(Key(spot.name, spot.side, spot.occurrence), spot.index)
        if found is not None:
            self._batch_dims[form] = found
            self._batch_dims.setdefault(_any_firing(form), found)
        return self._batch_dims.get(form) or self._batch_dims.get(_any_firing(form))

    def settle(self, claims: Mapping[Form, Claim]) -> None:
        """Agree with all ranks on the layouts claimed here. Collective."""
        if not self.mesh.axes:
            return
        for form, found in settle(claims, self.mesh, self._device).items():
            self.known[form] = found
            place = _any_firing(form)
            before = self._common.setdefault(place, found)
            if not _alike(before, found):
                self._common[place] = None
            elif isinstance(found, Layout):
                self._common[place] = found

    def gradient_layout(self, forward: Layout, grad: Tensor) -> Layout:
        """The layout of a gradient, from that of the value it belongs to."""
        placements = list(forward.placements)
        for axis, placement in enumerate(placements):
            if shard_dim(placement) is None and self.mesh.axes[axis].kind == "data":
                placements[axis] = Partial("avg" if self.mesh.mean else "sum")
            elif isinstance(placement, Partial):
                placements[axis] = Replicate()
        for axis, (placement, _) in self.stated(grad).items() if isinstance(grad, DTensor) else ():
            placements[axis] = placement
        return Layout(tuple(placements), forward.evidence, forward.shape, forward.ragged, forward.proven)


def _any_firing(form: Form) -> Form:
    return form._replace(spot=form.spot._replace(occurrence=0))


def _alike(a: Layout | LayoutError | None, b: Layout | LayoutError) -> bool:
    if isinstance(a, Layout) and isinstance(b, Layout):
        return a.placements == b.placements
    return isinstance(a, LayoutError) and isinstance(b, LayoutError)


def _positive(placement: Placement, dims: int) -> Placement:
    dim = shard_dim(placement)
    if dim is None or dim >= 0:
        return placement
    if isinstance(placement, _StridedShard):
        return _StridedShard(dim + dims, split_factor=placement.split_factor)
    return Shard(dim + dims)


def placements_on(mesh: ModelMesh, device_mesh: Any, placements: Any) -> dict[int, Placement]:
    """Placements of a DTensor by the model's axes."""
    lines = [a.ranks for a in axes_of_mesh(device_mesh, "tensor", "axis")]
    mine = {a.ranks: i for i, a in enumerate(mesh.axes)}
    return {mine[line]: p for line, p in zip(lines, placements, strict=True) if line in mine}
