"""What a picture of a model is made of: one row a module, with its parameters and with what passes it.

Rows are plain and small, so that stages of a pipeline can tell one another theirs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.placement_types import Placement

from flex_model.core.inference import placements_on
from flex_model.layout.layout import replicates
from flex_model.layout.values import local, sharding

if TYPE_CHECKING:
    from flex_model.core.runtime import Runtime

__all__ = ["ModuleRow", "ParameterRow", "ValueRow", "module_rows", "words"]


@dataclass(frozen=True, slots=True)
class ParameterRow:
    """A parameter of a module itself. ``placements``: by axis of the mesh, as torch writes them."""

    name: str
    shape: tuple[int, ...]
    local: tuple[int, ...] | None
    dtype: str
    trainable: bool
    placements: tuple[str, ...] = ()
    same_as: str = ""

    @property
    def size(self) -> int:
        return prod(self.shape)

    @property
    def size_here(self) -> int:
        """``local`` is None of a parameter of another stage."""
        return 0 if self.local is None else prod(self.local)


@dataclass(frozen=True, slots=True)
class ValueRow:
    """A tensor that goes into a module or comes out, in the forward that was looked at; whole and on this rank.

    ``refusal``: why it has no whole value. ``times``: how often the module ran.
    """

    side: str
    index: int
    shape: tuple[int, ...] | None
    local: tuple[int, ...]
    dtype: str
    placements: tuple[str, ...] = ()
    evidence: str = ""
    refusal: str = ""
    times: int = 1


@dataclass(slots=True)
class ModuleRow:
    """``stages``: of a pipeline, those that have it."""

    name: str
    kind: str
    fires: bool
    same_as: str = ""
    stages: tuple[int, ...] = ()
    parameters: list[ParameterRow] = field(default_factory=list)
    values: list[ValueRow] = field(default_factory=list)


def words(placements: Sequence[Placement], parted: Sequence[int] = ()) -> tuple[str, ...]:
    """Placements by axis, as they are shown: ``R``, ``S(2)``, ``P(sum)``; ``parts`` where each rank has its own."""
    shown = ("R" if replicates(p) else str(p) for p in placements)
    return tuple("parts" if i in parted else word for i, word in enumerate(shown))


def module_rows(runtime: Runtime) -> dict[str, ModuleRow]:
    """Every module of the model by its clean name, with the parameters that this rank knows. Never collective."""
    names = runtime.names
    others = names.others("module")
    rows = {
        n: ModuleRow(n, _class_of(runtime, n), not names.never_fires(n), others.get(n, ""), _stages(runtime, n))
        for n in names.everywhere()
    }
    for name, row in _parameter_rows(runtime):
        if name in rows:
            rows[name].parameters.append(row)
    return rows


def _class_of(runtime: Runtime, name: str) -> str:
    """As it was before an engine swapped it."""
    module = runtime.names.modules.get(name)
    plain = None if module is None else runtime.engines.plain_class(module)
    return runtime.names.class_of(name) if plain is None else plain.__name__


def _stages(runtime: Runtime, name: str) -> tuple[int, ...]:
    return tuple(t.stage for t in runtime.names.stages.tables if name in t.modules)


def _parameter_rows(runtime: Runtime) -> Iterator[tuple[str, ParameterRow]]:
    """(name of the module, row)."""
    names, engines = runtime.names, runtime.engines
    told, kept, tied = engines.whole_shapes(), engines.kept_parameters(), names.others("parameter")
    of = {id(m): n for n, m in reversed(names.modules.items())}
    for name, (owner, attribute) in names.parameters.items():
        place = id(owner), attribute
        parameter = kept.get(place, names.parameter(name))
        whole = told.get(place)
        if parameter is None and whole is None:
            continue
        spec = None if parameter is None else sharding(parameter)
        here = None if parameter is None else local(parameter)
        if whole is None and parameter is not None:
            whole = engines.full_shape(parameter) or tuple(parameter.shape if spec is None else spec.shape)
        assert whole is not None
        mine = None if here is None else tuple(here.shape)
        yield (
            of.get(id(owner), name.rpartition(".")[0]),  # a part of a model that a rank has several parts of
            ParameterRow(
                attribute,
                whole,
                mine,
                "" if here is None else str(here.dtype).removeprefix("torch."),
                names.requires_grad(name),
                _placed(runtime, owner, attribute, spec, whole, mine),
                tied.get(name, ""),
            ),
        )


def _placed(
    runtime: Runtime, owner: nn.Module, attribute: str, spec: Any, whole: tuple[int, ...], mine: tuple[int, ...] | None
) -> tuple[str, ...]:
    """A word an axis: ``flat`` where it is a piece of a flat parameter."""
    mesh = runtime.mesh
    if spec is not None:
        on = placements_on(mesh, spec.mesh, spec.placements)
        return words([on.get(i, Replicate()) for i in range(len(mesh.axes))])
    lines = {tuple(line) for line in runtime.engines.parted(owner, attribute)}
    same = mine is not None and len(whole) == len(mine)
    dims = [d for d, (a, b) in enumerate(zip(whole, mine or (), strict=False)) if a != b] if same else []
    part = f"S({dims[0]})" if len(dims) == 1 else "flat"
    return tuple(part if a.ranks in lines else "R" for a in mesh.axes)
