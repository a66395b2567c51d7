"""``Engine``: what the rest asks of one parallel framework."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, ClassVar, Protocol

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.placement_types import Placement

from flex_model.layout.mesh import Axis, AxisKind
from flex_model.layout.sequence import Order

__all__ = ["Conductor", "Engine", "GradientSite", "axes_of_mesh"]


def axes_of_mesh(mesh: DeviceMesh, kind: AxisKind, default: str) -> list[Axis]:
    """The axes of a DeviceMesh as lines of global ranks through this rank."""
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        return []
    names = mesh.mesh_dim_names or tuple(default if mesh.ndim == 1 else f"{default}{i}" for i in range(mesh.ndim))
    axes = []
    for i, name in enumerate(names):
        line: tuple[int | slice, ...] = tuple(slice(None) if d == i else c for d, c in enumerate(coordinate))
        axes.append(Axis(name, kind, tuple(int(r) for r in mesh.mesh[line].tolist())))
    return axes


class GradientSite:
    """How the gradient of one parameter is met: locally in the middle of the backward, or whole when it is done.

    ``stated``: placements of the local gradient by axis kind, where the engine knows them.
    """

    def __init__(self, when: str, stated: Mapping[AxisKind, Placement] | None = None) -> None:
        self.when = when  # "local" | "finished"
        self.stated = dict(stated or {})


class Conductor(Protocol):
    """Who is told what a pipeline's schedule does, by the engine that sees it."""

    def look(self) -> None:
        """A step is about to begin somewhere: the model may have become a stage since the last look."""

    def holds(self, module: nn.Module) -> bool:
        """Whether ``module`` is a stage of the conductor's model."""
        ...

    def step(self, microbatches: int, *, divide: int, backward: bool) -> AbstractContextManager[None]:
        """One step or eval of the schedule, on every rank. Gradients are divided by ``divide`` at its end."""
        ...

    def forward(self, stage: int, microbatch: int) -> AbstractContextManager[None]:
        """What runs in here is the forward of one microbatch on one stage of this rank."""
        ...

    def backward(self, stage: int, microbatch: int) -> AbstractContextManager[None]: ...


class Engine:
    """One parallel framework, as found on one model. The base class is a model without any."""

    name: ClassVar[str] = "none"
    distributed: ClassVar[bool] = True  # it needs a process group

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    @classmethod
    def find(cls, module: nn.Module) -> Engine | None:
        """The engine, if it is at work on ``module``."""
        return None

    @property
    def axes(self) -> list[Axis]:
        """The mesh axes this engine spreads the model over."""
        return []

    @property
    def alive(self) -> bool:
        """Whether what was found is still there."""
        return True

    @property
    def meshes(self) -> list[DeviceMesh]:
        """DeviceMeshes seen; their root mesh orders the axes of several engines."""
        return []

    @property
    def sequence_order(self) -> Order | None:
        """How the ranks of its sequence axis share the sequence; None: it does not say."""
        return None

    @property
    def sharding(self) -> frozenset[tuple[int, ...]]:
        """Ranks along each axis, through this rank, over which some parameter is sharded."""
        return frozenset()

    @property
    def lockstep(self) -> bool:
        """Whether all ranks of this engine's axes are known to run the same forwards now."""
        return True

    def order(self, module: nn.Module, side: str, dim: int, size: int) -> int | str | None:
        """For a value sharded on ``dim`` (counted from the end) of full ``size``: the number of blocks it consists of,
        why that is unknown, or None: not my layer."""
        return None

    def placements(self, module: nn.Module, side: str, index: int, dims: int) -> Mapping[tuple[int, ...], Placement]:
        """What this engine's rules say of tensor ``index`` (of ``dims`` dims) of a module's input or output:
        {ranks along an axis: placement}. Axes left out are found by other evidence."""
        return {}

    def plain_class(self, module: nn.Module) -> type | None:
        """The class a module had before this engine swapped it; None where it did not."""
        return None

    def full_shape(self, parameter: Tensor) -> tuple[int, ...] | None:
        """The global shape of a parameter that does not tell itself; None: not mine."""
        return None

    def make_whole(self, twin: nn.Module) -> None:
        """``twin`` is a copy of the model on the meta device, with parameters of global shapes and without process
        groups: put the sizes that modules keep for themselves to what they are without this engine."""

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Code in here runs as if this rank were the only one: for the twin, which must not talk to others."""
        yield

    # -- pipelines ---------------------------------------------------------------------------------------------
    no_backward: ClassVar[str] = ""  # why nothing goes backward through this engine's pipeline
    plain_names: ClassVar[bool] = True  # names on a stage are the plain model's

    @property
    def parts(self) -> Mapping[int, nn.Module]:
        """The pipeline stages of this rank by number, where a schedule runs them in microbatches."""
        return {}

    def absent(self, module: nn.Module) -> bool:
        """Whether ``module`` only stands in for one of another stage."""
        return False

    def stage_inputs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What the code of this rank's stage gets when the model is called with these inputs."""
        return args, kwargs

    @classmethod
    def listen(cls, conductor: Conductor) -> None:
        """Tell ``conductor`` from now on of the steps of schedules that run stages of its model."""

    def hidden_parameters(self) -> list[tuple[nn.Module, str, nn.Parameter]]:
        """(owner, attribute, what holds it) of parameters that the owner itself does not have at the moment."""
        return []

    def gradient_site(self, owner: nn.Module, attribute: str) -> GradientSite | None:
        """Where the gradient of a parameter is met; None: not my parameter."""
        return None

    def full_parameter(self, owner: nn.Module, attribute: str) -> Tensor | None:
        """The full parameter, detached; None: not my parameter. Collective."""
        return None

    def gradient_before(self, owner: nn.Module, attribute: str) -> Tensor | None:
        """What this rank has accumulated before a backward, for a ``finished`` gradient site."""
        return None

    def full_gradient(self, owner: nn.Module, attribute: str, before: Tensor | None) -> Tensor | None:
        """The full gradient of the backward that is done; None: there is none. Collective."""
        return None

    def add_to_gradient(self, owner: nn.Module, attribute: str, change: Tensor) -> None:
        """Add a full tensor to the accumulated gradient."""
        raise NotImplementedError(self.name)

    @contextmanager
    def undisturbed(self) -> Iterator[None]:
        """Forwards in here leave no trace in what this engine keeps on the model."""
        yield

    def keep_alive(self) -> bool:
        """Whether a parameter that gets no gradient would stall this engine's backward."""
        return False
