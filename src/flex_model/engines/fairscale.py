"""fairscale's model-parallel layers: plain local tensors, sizes in the layers' attributes, groups in globals.

Only the layers themselves say how they lie. Modules around them are found by the twin, with the layers' sizes made
whole, and with the sizes that a user's module keeps for itself read from its source (``own_sizes.py``).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from typing import Any, ClassVar, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import Partial, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement
from torch.utils._python_dispatch import _disable_current_modes

from flex_model.engines.engine import Engine, GradientSite
from flex_model.engines.own_sizes import Calls, own_sizes, uses, whole_value
from flex_model.engines.solo import known, silent_group
from flex_model.errors import LayoutError
from flex_model.layout.mesh import Axis
from flex_model.layout.twin import Mimic, Opaque
from flex_model.layout.values import digest, same
from flex_model.routing.collectives import all_gather_objects, all_gather_parts

__all__ = ["FairscaleEngine"]

_CALLS = Calls(
    sizes=frozenset({"get_model_parallel_world_size"}),
    ranks=frozenset({"get_model_parallel_rank"}),
    groups=frozenset({"get_model_parallel_group"}),
    moves=frozenset(f"{v}_model_parallel_region" for v in ("copy_to", "gather_from", "reduce_from", "scatter_to")),
)
_MOVING = _CALLS.moves | _CALLS.groups
_GLOBALS = ("_MODEL_PARALLEL_GROUP", "_DATA_PARALLEL_GROUP", "_PIPELINE_PARALLEL_GROUP")


class _Layer(NamedTuple):
    """A fairscale layer: the dim each parameter is sharded on, and the attributes that hold local sizes."""

    sharded: Mapping[str, int]
    whole: Mapping[str, str | int]  # local attribute: the one that has its whole value, or that value


_LAYERS = {
    "ColumnParallelLinear": _Layer({"weight": 0, "bias": 0}, {"output_size_per_partition": "out_features"}),
    "RowParallelLinear": _Layer({"weight": 1}, {"input_size_per_partition": "in_features"}),
    "ParallelEmbedding": _Layer({"weight": 1}, {"embedding_dim_per_partition": "embedding_dim"}),
    "VocabParallelEmbedding": _Layer(
        {"weight": 0},
        {
            "num_embeddings_per_partition": "num_embeddings",
            "vocab_start_index": 0,
            "vocab_end_index": "num_embeddings",
        },
    ),
}


def _groups() -> Any:
    """fairscale's module of globals, if it is at work."""
    module = sys.modules.get("fairscale.nn.model_parallel.initialize")
    return module if module is not None and module.model_parallel_is_initialized() else None


def _base(module: nn.Module) -> Any:
    """The fairscale class a module is of."""
    return next(
        (c for c in type(module).__mro__ if c.__name__ in _LAYERS and c.__module__.startswith("fairscale.")), None
    )


def _layer(module: nn.Module) -> _Layer | None:
    base = _base(module)
    return None if base is None else _LAYERS[base.__name__]


class FairscaleEngine(Engine):
    """Some module is a fairscale layer, or calls its collectives, and fairscale's groups are set up."""

    name: ClassVar[str] = "fairscale"

    @classmethod
    def find(cls, module: nn.Module) -> FairscaleEngine | None:
        if _groups() is None:
            return None
        modules = list(module.modules())
        if not any(_layer(m) is not None or uses(m, _MOVING) for m in modules):
            return None
        if any(isinstance(m, (FSDPModule, FullyShardedDataParallel)) for m in modules):
            raise LayoutError(
                "fairscale's layers under FSDP are not supported: use DDP over its data parallel group.",
                page="engine-unsupported",
            )
        return cls(module)

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        groups = _groups()
        self._group: dist.ProcessGroup = groups.get_model_parallel_group()
        self._line = tuple(dist.get_process_group_ranks(self._group))
        self._data = tuple(dist.get_process_group_ranks(groups.get_data_parallel_group()))
        self._solo = silent_group()
        self._silent = silent_group(dist.get_rank(self._group), len(self._line))

    @property
    def axes(self) -> list[Axis]:
        return [Axis("dp", "data", self._data), Axis("tp", "tensor", self._line)]

    @property
    def alive(self) -> bool:
        groups = _groups()
        return groups is not None and groups.get_model_parallel_group() in (self._group, self._solo, self._silent)

    @property
    def lockstep(self) -> bool:
        # As under DDP: whoever reduces gradients over the data group keeps steps together, evaluation need not.
        return len(self._data) == 1 or torch.is_grad_enabled()

    # -- activations ---------------------------------------------------------------------------------------------
    def placements(self, module: nn.Module, side: str, index: int, dims: int) -> dict[tuple[int, ...], Placement]:
        base = _base(module)
        own = base is None or type(module).forward is not base.forward or "forward" in module.__dict__
        if own or index:
            return {}  # a forward of the user's own
        if side == "out":
            local = not getattr(module, "gather_output", True)
        else:
            local = bool(getattr(module, "input_is_parallel", False))
        return {self._line: Shard(-1) if local else Replicate()}

    # -- the twin ------------------------------------------------------------------------------------------------
    @cached_property
    def _shapes(self) -> dict[int, tuple[int, ...]]:
        found = {}
        for module in self.module.modules():
            for attribute, parameter in module._parameters.items():
                dim = self._sharded_dim(module, attribute)
                if parameter is not None and dim is not None:
                    shape = list(parameter.shape)
                    shape[dim] *= len(self._line)
                    found[id(parameter)] = tuple(shape)
        return found

    def full_shape(self, parameter: Tensor) -> tuple[int, ...] | None:
        return self._shapes.get(id(parameter))

    def make_whole(self, twin: nn.Module) -> None:
        self.__dict__.pop("_shapes", None)  # the next twin may be of other parameters
        for name, module in twin.named_modules():
            layer = _layer(module)
            if layer is None:
                self._make_own_whole(name, module)
                continue
            for local, whole in layer.whole.items():
                setattr(module, local, getattr(module, whole) if isinstance(whole, str) else whole)

    def _make_own_whole(self, name: str, module: nn.Module) -> None:
        """A user's module: the sizes it keeps, or an end to the twin where they cannot be known."""
        if uses(module, _MOVING) and any(p is not None for p in module._parameters.values()):
            _stop(name, module, "it calls fairscale's collectives and has parameters of its own")
            return
        for attribute, local in own_sizes(module, _CALLS).items():
            if local.is_group:
                setattr(module, attribute, self._solo)
                continue
            inner = getattr(module, attribute, None)
            try:
                if isinstance(inner, (nn.Module, nn.Parameter)):
                    raise ValueError(local.problem or "it has a local size")
                if hasattr(module, attribute) or local.problem:
                    setattr(module, attribute, whole_value(inner, local, len(self._line)))
            except ValueError as error:
                _stop(name, module, f"its {attribute or 'code'} depends on the number of ranks: {error}")

    @contextmanager
    def alone(self) -> Iterator[None]:
        with known(self._solo), _replaced(_groups(), dict.fromkeys(_GLOBALS, self._solo)):
            yield

    @contextmanager
    def mimicked(self) -> Iterator[Mimic]:
        mappings = sys.modules["fairscale.nn.model_parallel.mappings"]
        groups = {**dict.fromkeys(_GLOBALS, self._solo), "_MODEL_PARALLEL_GROUP": self._silent}
        with known(self._solo), known(self._silent), _replaced(_groups(), groups):
            # unseen by the twin's modes: without other ranks these are no operations at all
            moves = {"_reduce": lambda _, x: x, "_gather": self._as_gathered, "_split": self._as_split}
            with _replaced(mappings, moves if len(self._line) > 1 else {}):
                yield Mimic(self._silence)

    def _silence(self, copied: nn.Module) -> None:
        for module in copied.modules():
            for attribute, local in own_sizes(module, _CALLS).items() if _layer(module) is None else ():
                if local.is_group:
                    setattr(module, attribute, self._silent)
                elif isinstance(value := getattr(module, attribute, None), Tensor):
                    setattr(module, attribute, value.to("meta"))  # as the twin's

    def _as_gathered(self, x: Tensor) -> Tensor:
        with _disable_current_modes():
            return x.new_empty((*x.shape[:-1], x.shape[-1] * len(self._line)))

    def _as_split(self, x: Tensor) -> Tensor:
        with _disable_current_modes():
            return x.new_empty((*x.shape[:-1], x.shape[-1] // len(self._line)))

    # -- parameters ----------------------------------------------------------------------------------------------
    def _sharded_dim(self, owner: nn.Module, attribute: str) -> int | None:
        layer = _layer(owner)
        return None if layer is None else layer.sharded.get(attribute)

    def gradient_site(self, owner: nn.Module, attribute: str) -> GradientSite:
        dim = self._sharded_dim(owner, attribute)
        # Without DDP around, what a rank holds of a gradient is that of its own batch until the user reduces it.
        return GradientSite("local", {"data": Partial("avg"), "tensor": Replicate() if dim is None else Shard(dim)})

    def full_parameter(self, owner: nn.Module, attribute: str) -> Tensor | None:
        parameter = owner._parameters.get(attribute)
        if parameter is None:
            return None
        local, dim = parameter.detach(), self._sharded_dim(owner, attribute)
        if dim is not None:
            return torch.cat(all_gather_parts(local, [local.shape] * len(self._line), self._group), dim)
        found = all_gather_objects(digest(local), self._group)
        if not same(found) or (_layer(owner) is None and uses(owner, _MOVING)):
            shapes = dict(zip(self._line, [d.shape for d in found], strict=True))
            raise LayoutError(
                f"{attribute} of {type(owner).__name__}: the full parameter is unknown: it is in no layer of "
                f"fairscale's own, and its module splits it. Local shapes by rank: {shapes}.",
                page="parameter-unknown",
            )
        return local.clone()


@contextmanager
def _replaced(module: Any, values: Mapping[str, Any]) -> Iterator[None]:
    """Other globals in a module for the time of the block."""
    before = {name: getattr(module, name) for name in values}
    try:
        for name, value in values.items():
            setattr(module, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(module, name, value)


def _stop(name: str, module: nn.Module, why: str) -> None:
    """End the twin where it reaches ``module``: what it saw before that counts, and nothing after it."""
    message = f"{name or 'the model'} ({type(module).__name__}) has no known whole: {why}"

    def stop(*_: object) -> None:
        raise Opaque(message)

    module.register_forward_pre_hook(stop)
