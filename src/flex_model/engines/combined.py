"""``Engines``: all engines that are at work on one model, in one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.placement_types import Placement

from flex_model.engines.accelerate import AccelerateEngine
from flex_model.engines.context_parallel import ContextParallelEngine
from flex_model.engines.ddp import DDPEngine
from flex_model.engines.dtensor import DTensorEngine
from flex_model.engines.engine import Conductor, Engine, GradientSite, Held, axes_of_mesh
from flex_model.engines.experts import ExpertsEngine
from flex_model.engines.fairscale import FairscaleEngine
from flex_model.engines.fsdp1 import FSDP1Engine
from flex_model.engines.fsdp2 import FSDP2Engine
from flex_model.engines.generation import keeps_company
from flex_model.engines.grid import beside, named_apart, on_grid
from flex_model.engines.hf import TransformersEngine
from flex_model.engines.megatron import MegatronEngine
from flex_model.engines.megatron_pipeline import MegatronPipelineEngine
from flex_model.engines.pipelining import PipeliningEngine, stages_made
from flex_model.engines.quantised import dequantised
from flex_model.engines.replicate import ReplicateEngine
from flex_model.layout.mesh import Axis, AxisKind, ModelMesh
from flex_model.layout.sequence import Order
from flex_model.layout.twin import Mimic
from flex_model.routing.rows import RowSource

__all__ = ["Engines", "wrapped"]

# The sequence's axis first, which data engines may lie over; then data engines: what they claim is theirs; DTensor
# takes the axes that are left.
_KNOWN: tuple[type[Engine], ...] = (
    ContextParallelEngine,
    DDPEngine,
    ReplicateEngine,
    FSDP1Engine,
    FSDP2Engine,
    MegatronEngine,
    MegatronPipelineEngine,
    FairscaleEngine,
    TransformersEngine,
    PipeliningEngine,
    DTensorEngine,
    AccelerateEngine,
    ExpertsEngine,
)
_DATA_NAMES = ("dp", "ddp", "fsdp", "hsdp", "dp_replicate", "dp_shard", "replicate", "shard", "data", "batch")
_SEQUENCE_NAMES = ("cp", "context", "context_parallel")


def _kind(axis_name: str) -> AxisKind:
    if axis_name in ("pp", "stage", "pipe", "pipeline"):
        return "stage"
    return "data" if axis_name in (*_DATA_NAMES, *_SEQUENCE_NAMES) else "tensor"


def wrapped(module: nn.Module) -> str | None:
    """The attribute that holds the wrapped model, if ``module`` is some engine's wrapper around one."""
    return next((name for known in _KNOWN if (name := known.wrapped(module)) is not None), None)


class Engines:
    """The engines found on a model, in one: the first that has an answer gives it."""

    def __init__(self, nested: Sequence[nn.Module], before: Engines | None = None) -> None:
        """``nested`` is one model with all its wrappers, the outermost first.

        A DDP that was seen ``before`` at work around the model stays found when the model is called without it, as
        trainers do to evaluate: its ranks still hold parts of one batch.
        """
        self.found: list[Engine] = []
        ready = dist.is_available() and dist.is_initialized()
        for known in _KNOWN:
            if ready or not known.distributed:
                engines = [e for e in (known.find(module) for module in nested) if e is not None]
                engines += [e for e in (before.found if before else ()) if type(e) is DDPEngine is known and e.alive]
                self.found += engines[:1]

    @property
    def alive(self) -> bool:
        return all(e.alive for e in self.found)

    @property
    def names(self) -> list[str]:
        return [e.name for e in self.found]

    @property
    def lockstep(self) -> bool:
        return all(e.lockstep for e in self.found)

    @property
    def keep_alive(self) -> bool:
        return any(e.keep_alive() for e in self.found)

    def mesh(self, given: DeviceMesh | None, *, timeout: timedelta, mean: bool) -> ModelMesh:
        """The model's mesh: the user's, or the axes of all engines on the root mesh they share."""
        if given is not None:
            names = given.mesh_dim_names or ()
            found = axes_of_mesh(given, "tensor", names[0] if names else "tp")
            axes = [Axis(a.name, _kind(a.name), a.ranks, a.name in _SEQUENCE_NAMES) for a in found]
            return ModelMesh(*on_grid(axes, [given]), timeout=timeout, mean=mean)
        axes = []
        others = frozenset[tuple[int, ...]]().union(*(e.other_lines for e in self.found))
        for engine in self.found:
            for axis in (beside(a, axes) for a in engine.axes):
                if axis.size > 1 and axis.ranks not in others and not any(axis.ranks == a.ranks for a in axes):
                    axes.append(named_apart(axis, axes))
        meshes = [m for e in self.found for m in e.meshes]
        return ModelMesh(*on_grid(axes, meshes), timeout=timeout, mean=mean)

    @property
    def sequence_order(self) -> Order | None:
        return next((order for e in self.found if (order := e.sequence_order) is not None), None)

    @staticmethod
    def keeps_company() -> bool:
        """Whether the forward that begins now is no call of this rank, and runs for the others only."""
        return keeps_company()

    @staticmethod
    def switched_on() -> object:
        """Changes when an engine is switched on or off around the model."""
        return ContextParallelEngine.active()

    @property
    def sharding(self) -> frozenset[tuple[int, ...]]:
        return frozenset(line for e in self.found for line in e.sharding)

    @contextmanager
    def undisturbed(self) -> Iterator[None]:
        with ExitStack() as stack:
            for engine in self.found:
                stack.enter_context(engine.undisturbed())
            yield

    @property
    def held(self) -> list[Held]:
        """One a function; where one engine's forward ends, no other's has to go on."""
        found = sorted((h for e in self.found for h in e.held), key=lambda h: h.answer is None)
        return list({(id(h.module), h.attribute): h for h in reversed(found)}.values())

    def order(self, module: nn.Module, side: str, dim: int, size: int) -> int | str:
        for engine in self.found:
            answer = engine.order(module, side, dim, size)
            if answer is not None:
                return answer
        return 1

    def placements(self, module: nn.Module, side: str, index: int, dims: int) -> dict[tuple[int, ...], Placement]:
        merged: dict[tuple[int, ...], Placement] = {}
        for engine in reversed(self.found):
            merged.update(engine.placements(module, side, index, dims))
        return merged

    def unknown(self, module: nn.Module, side: str, index: int) -> str:
        return next((word for e in self.found if (word := e.unknown(module, side, index))), "")

    def batch_dim(self, module: nn.Module, inputs: Any) -> int:
        return max((e.batch_dim(module, inputs) for e in self.found), default=0)

    def flattens(self, module: nn.Module, side: str) -> bool:
        return any(e.flattens(module, side) for e in self.found)

    def inner_rows(self, module: nn.Module, inputs: Any) -> int:
        return next(e for e in self.found if e.flattens(module, "out")).inner_rows(module, inputs)

    def doubt(self, module: nn.Module, side: str) -> str:
        return next((word for e in self.found if (word := e.doubt(module, side))), "")

    def late_gradients(self, module: nn.Module, side: str, index: int) -> list[tuple[int, ...]]:
        return [line for e in self.found for line in e.late_gradients(module, side, index)]

    def full_shape(self, parameter: Tensor) -> tuple[int, ...] | None:
        return next((s for e in self.found if (s := e.full_shape(parameter)) is not None), None)

    def parted(self, owner: nn.Module, attribute: str) -> list[tuple[int, ...]]:
        return [line for e in self.found for line in e.parted(owner, attribute)]

    def whole_shapes(self) -> dict[tuple[int, str], tuple[int, ...]]:
        return {place: shape for e in self.found for place, shape in e.whole_shapes().items()}

    def kept_parameters(self) -> dict[tuple[int, str], Tensor]:
        return {place: kept for e in self.found for place, kept in e.kept_parameters().items()}

    def stand_ins(self) -> dict[int, object]:
        return {place: other for e in self.found for place, other in e.stand_ins().items()}

    def make_whole(self, twin: nn.Module) -> None:
        for engine in self.found:
            engine.make_whole(twin)

    @property
    def no_backward(self) -> str:
        return next((e.no_backward for e in self.found if e.no_backward), "")

    @property
    def plain_names(self) -> bool:
        return all(e.plain_names for e in self.found)

    @property
    def parts(self) -> dict[int, nn.Module]:
        return {stage: part for e in self.found for stage, part in e.parts.items()}

    @property
    def renamed(self) -> dict[str, str]:
        return {name: plain for e in self.found for name, plain in e.renamed.items()}

    def entry(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
        for engine in self.found:
            module, args, kwargs = engine.entry(module, args, kwargs)
        return module, args, kwargs

    def absent(self, module: nn.Module) -> bool:
        return any(e.absent(module) for e in self.found)

    def stage_inputs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        for engine in self.found:
            args, kwargs = engine.stage_inputs(args, kwargs)
        return args, kwargs

    @staticmethod
    def listen(conductor: Conductor) -> None:
        for known in _KNOWN:
            known.listen(conductor)

    @staticmethod
    def stages_made() -> int:
        """Changes when a pipeline stage was made, around whatever module."""
        return stages_made()

    @contextmanager
    def alone(self) -> Iterator[None]:
        with ExitStack() as stack:
            for engine in self.found:
                stack.enter_context(engine.alone())
            yield

    @contextmanager
    def mimicked(self) -> Iterator[Mimic | None]:
        with ExitStack() as stack:
            found = [stack.enter_context(engine.mimicked()) for engine in self.found]
            yield next((mimic for mimic in found if mimic is not None), None)

    def row_source(self, module: nn.Module | None) -> RowSource | None:
        """What knows the rows that ``module`` sees; None outside of mixtures of experts."""
        sources = () if module is None else (s for e in self.found for s in e.row_sources if s.holds(module))
        return next(iter(sources), None)

    def plain_class(self, module: nn.Module) -> type | None:
        return next((c for e in self.found if (c := e.plain_class(module)) is not None), None)

    def hidden_parameters(self) -> list[tuple[nn.Module, str, nn.Parameter]]:
        return [hidden for e in self.found for hidden in e.hidden_parameters()]

    def devices(self) -> set[torch.device]:
        return {d for e in self.found for d in e.devices()}

    def tied_places(self) -> list[tuple[tuple[nn.Module, str], tuple[nn.Module, str]]]:
        return [pair for e in self.found for pair in e.tied_places()]

    def gradient_site(self, owner: nn.Module, attribute: str) -> tuple[Engine | None, GradientSite]:
        """Who meets the gradient of a parameter and when; placements are those of all engines together."""
        sites = [(e, s) for e in self.found if (s := e.gradient_site(owner, attribute)) is not None]
        finished = next(((e, s) for e, s in sites if s.when != "local"), None)
        if finished is not None:
            return finished
        stated = {kind: p for _, s in sites for kind, p in s.stated.items()}
        refusal = next((s.refusal for _, s in sites if s.refusal), "")
        return None, GradientSite("local", stated, refusal=refusal)

    def full_parameter(self, owner: nn.Module, attribute: str) -> Tensor:
        for engine in self.found:
            full = engine.full_parameter(owner, attribute)
            if full is not None:
                return dequantised(owner, attribute, full)
        parameter = owner._parameters.get(attribute)
        assert parameter is not None
        return dequantised(owner, attribute, parameter.detach()).clone()
