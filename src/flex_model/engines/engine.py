"""``Engine``: what the rest asks of one parallel framework."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.placement_types import Placement

from flex_model.layout.mesh import Axis, AxisKind
from flex_model.layout.sequence import Order
from flex_model.layout.twin import Mimic
from flex_model.routing.rows import RowSource

__all__ = ["Conductor", "Engine", "GradientSite", "Held", "axes_of_mesh"]


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

    ``stated``: placements of the local gradient by axis kind, where the engine knows them. ``refusal``: why it is
    never met, or has no whole.
    """

    def __init__(self, when: str, stated: Mapping[AxisKind, Placement] | None = None, *, refusal: str = "") -> None:
        self.when = when  # "local" | "finished" | "never"
        self.stated = dict(stated or {})
        self.refusal = refusal


@dataclass(frozen=True, slots=True)
class Held:
    """A function of ``module`` that must return although the forward is stopped inside it, because its caller has work
    to do then. When the call of ``around`` is over, stopping goes on; with ``answer``, which makes what the function
    returns of its arguments, it has come to its end."""

    module: nn.Module
    around: nn.Module
    attribute: str = "forward"
    answer: Callable[[tuple[Any, ...], dict[str, Any]], Any] | None = None


class Conductor(Protocol):
    """Who is told what a pipeline's schedule does, by the engine that sees it."""

    def look(self) -> None:
        """A step is about to begin somewhere: the model may have become a stage since the last look."""

    def holds(self, module: nn.Module) -> bool:
        """Whether ``module`` is a stage of the conductor's model."""
        ...

    def stage_of(self, module: nn.Module | None) -> int:
        """The number of the stage that ``module`` is."""
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

    @classmethod
    def wrapped(cls, module: nn.Module) -> str | None:
        """The attribute that holds the wrapped model, if ``module`` is a wrapper of this engine's, with no trace in
        the keys of state_dict."""
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

    def unknown(self, module: nn.Module, side: str, index: int) -> str:
        """Why a tensor of a module's input or output has no whole, whatever other evidence says; "" where it may."""
        return ""

    def batch_dim(self, module: nn.Module, inputs: Any) -> int:
        """Which dim of the first tensor that ``module`` is called with holds the batch."""
        return 0

    def flattens(self, module: nn.Module, side: str) -> bool:
        """Whether dim 0 of a module's input or output is two dims in one, which ``placements`` then speaks of apart,
        because their shards are interleaved in it."""
        return False

    def inner_rows(self, module: nn.Module, inputs: Any) -> int:
        """The size of the inner of the two dims, on this rank in this call."""
        raise NotImplementedError(self.name)

    def doubt(self, module: nn.Module, side: str) -> str:
        """Why a copy of this module with whole parameters need not have a whole input or output; "" where it has."""
        return ""

    def late_gradients(self, module: nn.Module, side: str, index: int) -> Iterable[tuple[int, ...]]:
        """Axes (the ranks along each) that a tensor of a module's input or output is the same along, while each rank
        meets a part of its gradient only: this engine sums what becomes of it later."""
        return ()

    def plain_class(self, module: nn.Module) -> type | None:
        """The class a module had before this engine swapped it; None where it did not."""
        return None

    def full_shape(self, parameter: Tensor) -> tuple[int, ...] | None:
        """The global shape of a parameter that does not tell itself; None: not mine."""
        return None

    def whole_shapes(self) -> Mapping[tuple[int, str], tuple[int, ...]]:
        """{(id of an owner, attribute): shape of the whole parameter}, where what the owner holds does not tell."""
        return {}

    def kept_parameters(self) -> Mapping[tuple[int, str], Tensor]:
        """{(id of an owner, attribute): what is kept of a parameter between steps} where its owner may hold something
        else at the moment."""
        return {}

    def stand_ins(self) -> Mapping[int, object]:
        """{id of an object that a copy of the model must not share or copy: what takes its place there}"""
        return {}

    def make_whole(self, twin: nn.Module) -> None:
        """``twin`` is a copy of the model on the meta device, with parameters of global shapes and without process
        groups: put the sizes that modules keep for themselves to what they are without this engine."""

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Code in here runs as if this rank were the only one: for the twin, which must not talk to others."""
        yield

    @contextmanager
    def mimicked(self) -> Iterator[Mimic | None]:
        """Code of a copy with this rank's sizes runs in here as on this rank among the others, but without them.
        None: it cannot, and the order of shards is not checked that way."""
        yield None

    # -- pipelines ---------------------------------------------------------------------------------------------
    no_backward: ClassVar[str] = ""  # why nothing goes backward through this engine's pipeline
    plain_names: ClassVar[bool] = True  # names on a stage are the plain model's

    @property
    def parts(self) -> Mapping[int, nn.Module]:
        """The pipeline stages of this rank by number, where a schedule runs them in microbatches."""
        return {}

    @property
    def renamed(self) -> Mapping[str, str]:
        """{name on this rank: the plain model's name} where they differ and the engine knows both."""
        return {}

    def entry(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
        """What to run again, with what, so that ``module`` gets all it got in this call: also what came by an
        attribute."""
        return module, args, kwargs

    def absent(self, module: nn.Module) -> bool:
        """Whether ``module`` only stands in for one of another stage."""
        return False

    def stage_inputs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What the code of this rank's stage gets when the model is called with these inputs."""
        return args, kwargs

    @classmethod
    def listen(cls, conductor: Conductor) -> None:
        """Tell ``conductor`` from now on of the steps of schedules that run stages of its model."""

    @property
    def row_sources(self) -> Sequence[RowSource]:
        """The mixtures of experts inside which this engine knows the token and the expert of every row."""
        return ()

    @property
    def other_lines(self) -> frozenset[tuple[int, ...]]:
        """Lines of ranks along which parameters are sharded, and which are no axes of the model: another view of it."""
        return frozenset()

    def hidden_parameters(self) -> list[tuple[nn.Module, str, nn.Parameter]]:
        """(owner, attribute, what holds it) of parameters that the owner itself does not have at the moment."""
        return []

    def devices(self) -> set[torch.device]:
        """Where modules run, beside the devices that their parameters are on."""
        return set()

    def tied_places(self) -> list[tuple[tuple[nn.Module, str], tuple[nn.Module, str]]]:
        """Pairs of (owner, attribute) that are one parameter, the later and the first, where what the owners hold does
        not tell."""
        return []

    def gradient_site(self, owner: nn.Module, attribute: str) -> GradientSite | None:
        """Where the gradient of a parameter is met; None: not my parameter."""
        return None

    def full_parameter(self, owner: nn.Module, attribute: str) -> Tensor | None:
        """The full parameter, detached; None: not my parameter. Collective."""
        return None

    def parted(self, owner: nn.Module, attribute: str) -> Iterable[tuple[int, ...]]:
        """Axes (the ranks along each) over which a parameter is in parts, or another on each rank."""
        parameter = owner._parameters.get(attribute)
        full = None if parameter is None else self.full_shape(parameter)
        if parameter is None or full is None or full == tuple(parameter.shape):
            return []
        return [a.ranks for a in self.axes if a.kind == "tensor"]

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

    @property
    def held(self) -> Iterable[Held]:
        """Where this engine has something to do when a forward is over, also one that is stopped in the middle."""
        return ()

    def keep_alive(self) -> bool:
        """Whether a parameter that gets no gradient would stall this engine's backward."""
        return False
